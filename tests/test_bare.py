"""A model without anything of ours: exported in all of torch's ways, pickled, and averaged over time."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from tests.without import LIMIT
from tests.workers import NO_MODEL, bits, network, together, train

INPUTS = torch.linspace(-1, 1, 12).view(3, 4)


def trained(rank: int, given: bool = True, **options: Any) -> tuple[nn.Sequential, Any]:
    """A model after some steps, stepped ahead, in training mode; and its optimizer."""
    model = network()
    optimizer = hvd_saef.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model=model if given else None, **options
    )
    for step in range(3):
        train(model, optimizer, rank, step)
    return model, optimizer


def at_x(model: nn.Module, optimizer: Any) -> Tensor:
    """What the model makes of INPUTS at x."""
    with optimizer.consensus(), torch.no_grad():
        outputs: Tensor = model(INPUTS)
    return outputs


def script(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.jit.script(model)


def trace(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.jit.trace(model, INPUTS)  # type: ignore[no-any-return]


def export(model: nn.Module) -> Callable[[Tensor], Tensor]:
    program = torch.export.export(model, (INPUTS,), strict=True)
    assert not [node for node in program.graph.nodes if "grad" in str(node.target)]
    return program.module()


WAYS = [script, trace, export]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_what_is_exported_is_x(way: Callable[..., Callable[[Tensor], Tensor]], training: bool) -> None:
    def fn(rank: int) -> tuple[Tensor, Tensor]:
        model, optimizer = trained(rank)
        model.train(training)  # no forward pass in that mode comes before
        before = bits(dict(model.named_parameters()))
        exported = way(hvd_saef.bare_model(model))
        assert bits(dict(model.named_parameters())) == before
        with torch.no_grad():
            return exported(INPUTS), at_x(model, optimizer)

    # Exporters are not made for several threads.
    ((seen, wanted),) = together(1, fn)
    assert torch.allclose(seen, wanted, rtol=1e-6, atol=1e-7)


def test_what_is_exported_to_onnx_is_x(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    onnx = pytest.importorskip("onnx.reference", reason="needs onnx")

    def fn(rank: int) -> tuple[Any, Tensor]:
        model, optimizer = trained(rank)
        program = torch.onnx.export(hvd_saef.bare_model(model).eval(), (INPUTS,), dynamo=True)
        assert program is not None
        program.save(tmp_path / "model.onnx")
        evaluated = onnx.ReferenceEvaluator(str(tmp_path / "model.onnx"))
        return evaluated.run(None, {evaluated.input_names[0]: INPUTS.numpy()})[0], at_x(model, optimizer)

    ((seen, wanted),) = together(1, fn)
    assert torch.allclose(torch.as_tensor(seen), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings(NO_MODEL)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("options", [{}, {"local_steps": 2}, {"overlap": True}], ids=str)
def test_the_copy_is_x_on_all_ranks(given: bool, options: dict[str, Any]) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        model, optimizer = trained(rank, given, **options)
        bare = hvd_saef.bare_model(model)
        own = bits(dict(bare.state_dict()))
        with optimizer.consensus():
            assert bits(dict(model.state_dict())) == own
        assert bits(dict(hvd_saef.bare_model(model[0]).state_dict())) == bits(dict(bare[0].state_dict()))
        train(model, optimizer, rank, 3)  # goes on
        assert bits(dict(bare.state_dict())) == own  # and the copy does not
        return own

    first, second = together(2, fn)
    assert first == second


def test_training_is_the_same_with_and_without_a_copy() -> None:
    def fn(copies: bool) -> Callable[[int], dict[str, bytes]]:
        def work(rank: int) -> dict[str, bytes]:
            model, optimizer = trained(rank, local_steps=2)
            if copies:
                hvd_saef.bare_model(model)
            train(model, optimizer, rank, 3)
            return bits([dict(model.named_parameters()), optimizer.state_dict()])

        return work

    assert together(2, fn(True)) == together(2, fn(False))


LOAD = """
import sys
sys.modules["hvd_saef"] = None
import torch
model = torch.load(sys.argv[1], weights_only=False)
torch.save(model(torch.linspace(-1, 1, 12).view(3, 4)), sys.argv[2])
"""


@pytest.mark.parametrize("made", ["bare", "copy of a bare one", "bare one of a copy"])
def test_a_file_is_read_where_there_is_no_hvd_saef(made: str, tmp_path: Path) -> None:
    def fn(rank: int) -> tuple[nn.Module, Tensor]:
        model, optimizer = trained(rank)
        if made == "bare one of a copy":
            with optimizer.consensus():
                bare = hvd_saef.bare_model(copy.deepcopy(model))
        else:
            bare = hvd_saef.bare_model(model)
        return copy.deepcopy(bare) if made == "copy of a bare one" else bare, at_x(model, optimizer)

    ((bare, wanted),) = together(1, fn)
    assert b"hvd_saef" not in pickle.dumps(bare)
    torch.save(bare, tmp_path / "model.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt"), str(tmp_path / "outputs.pt")]
    subprocess.run(command, check=True, timeout=LIMIT, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "outputs.pt"), wanted)


def test_the_models_own_hooks_stay() -> None:
    seen: list[str] = []

    def note(module: nn.Module, args: Any) -> None:
        seen.append(type(module).__name__)

    def fn(rank: int) -> None:
        model = network()
        model.register_forward_pre_hook(note)
        model[0].register_forward_pre_hook(note)
        hvd_saef.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
        hvd_saef.bare_model(model)(INPUTS)

    together(1, fn)
    assert seen == ["Sequential", "Linear"]


def test_a_moving_average_of_a_bare_model_can_be_exported() -> None:
    def fn(rank: int) -> tuple[Tensor, Tensor]:
        model, optimizer = trained(rank)
        average = torch.optim.swa_utils.AveragedModel(
            hvd_saef.bare_model(model), avg_fn=lambda average, model, _: 0.5 * average + 0.5 * model
        )
        before = {name: value.clone() for name, value in average.module.state_dict().items()}
        with optimizer.consensus():
            average.update_parameters(model)  # the first one copies
            average.update_parameters(model)
        train(model, optimizer, rank, 3)
        with optimizer.consensus():
            average.update_parameters(model)
            wanted = {name: 0.5 * before[name] + 0.5 * value for name, value in model.state_dict().items()}
        buffer = io.BytesIO()
        torch.save(average.module, buffer)
        assert b"hvd_saef" not in buffer.getvalue()
        mine = torch.cat([value.view(-1) for value in average.module.state_dict().values()])
        return mine, torch.cat([value.view(-1) for value in wanted.values()])

    for average, wanted in together(2, fn):
        assert torch.allclose(average, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", [script, export], ids=lambda way: way.__name__)
def test_why_it_is_needed(way: Callable[..., Any]) -> None:
    """The counter-test: neither takes our hooks, on the model or on a deep copy of it."""

    def fn(rank: int) -> None:
        model, _ = trained(rank)
        for given in (model.eval(), copy.deepcopy(model)):
            with pytest.raises(Exception):  # noqa: B017, PT011 - what torch raises is its own
                way(given)

    together(1, fn)
