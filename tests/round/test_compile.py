"""Compiled models: wrapped before and after, with model= the compiled or the original one."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hvd_saef
from tests.older_torch import needs
from tests.workers import batch, bits, network, sgd, together, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:the largest block"),
    pytest.mark.xdist_group("compile"),  # importing the compiler takes seconds
    needs("compiler.set_stance"),  # that of torch 2.3.1 may crash in threads, also without the library
]

WORKERS = [1, 2]
HOWS = [
    "compiled, then wrapped",
    "model=original, compiled, then wrapped",
    "wrapped, then compiled",
    "in place",
]

B_IS_SEEN = pytest.mark.xfail(
    strict=True, reason="forward hooks are on the given model only, not on its parts"
)


@pytest.fixture(autouse=True, scope="module")
def compiler() -> Iterator[None]:
    """Imported here and not by several workers at once, which Python's import lock takes amiss."""
    pytest.importorskip("torch._dynamo")
    pytest.importorskip("torch._inductor.compile_fx")
    yield
    torch.compiler.reset()


class Compiled:
    """A model, the compiled one, and a wrapped optimizer."""

    def __init__(self, how: str, backend: str | Callable[..., Any] | None, **options: Any) -> None:
        self.model: nn.Module = network()
        self.called: nn.Module = self.model

        def compiled() -> nn.Module:
            if backend is None:
                return self.model
            if how == "in place":
                self.model.compile(backend=backend)
                return self.model
            model: Any = torch.compile(self.model, backend=backend, **compile_options)
            assert isinstance(model, nn.Module)
            return model

        compile_options = options.pop("compile_options", {})
        if how != "wrapped, then compiled":
            self.called = compiled()
        self.given = self.called if how == "compiled, then wrapped" else self.model
        base = sgd(list(self.model.parameters()))
        named = self.given.named_parameters()
        self.optimizer = hvd_saef.DistributedOptimizer(base, named, model=self.given, **options)
        if how == "wrapped, then compiled":
            self.called = compiled()

    def held(self) -> dict[str, bytes]:
        """The bits of the parameters, in order."""
        return bits(list(self.model.parameters()))

    def x(self) -> dict[str, bytes]:
        """The bits of x, in order."""
        return bits(list(self.optimizer.state_dict()["hvd_saef"]["x"].values()))


def run(how: str, backend: str | Callable[..., Any] | None, rank: int, **options: Any) -> dict[str, bytes]:
    """Train and evaluate in turns through the compiled model; check what is seen; give all that came out."""
    c = Compiled(how, backend, **options)
    outs = []
    for step in range(6):
        train(c.called, c.optimizer, rank, step)
        b, x = c.held(), c.x()
        assert b != x
        with torch.no_grad():
            if step % 3 != 1:
                outs.append(c.called.eval()(batch(9, step)))
                assert c.held() == x
                outs.append(c.called.train()(batch(9, step)))
                assert c.held() == b
            if step % 2:
                state = list(c.called.state_dict().values())
                assert bits(state) == x
    return bits([outs, list(c.model.parameters()), c.optimizer.state_dict()["state"]]) | c.x()


@pytest.mark.parametrize(("workers", "options"), [(1, {}), (2, {"local_steps": 3}), (4, {})], ids=str)
@pytest.mark.parametrize("how", HOWS)
def test_compiled_models_see_what_others_see(how: str, workers: int, options: dict[str, Any]) -> None:
    """To the bit, with the backend that runs torch's own operators."""
    torch.compiler.reset()
    ours = together(workers, lambda rank: run(how, "eager", rank, **options))
    assert ours == together(workers, lambda rank: run(how, None, rank, **options))


def graphs_of(call: Callable[[Callable[..., Any]], object]) -> int:
    """How many graphs a backend is given in a call."""
    torch.compiler.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    call(backend)
    return len(graphs)


def plain(backend: Callable[..., Any]) -> None:
    """Training and evaluation without the library."""
    model = network()
    compiled: Any = torch.compile(model, backend=backend)
    optimizer = sgd(list(model.parameters()))
    for step in range(2):
        train(compiled, optimizer, 0, step)
        with torch.no_grad():
            compiled.eval()(batch(9, step))
            compiled.train()(batch(9, step))


def hooked(backend: Callable[..., Any]) -> None:
    """A model that has a hook when it is compiled."""
    model = nn.Linear(1, 1)
    model.register_forward_pre_hook(torch.compiler.disable(lambda module, args: None))
    compiled: Any = torch.compile(model, backend=backend)
    compiled(torch.ones(1, 1))


@pytest.mark.parametrize("how", HOWS)
def test_hooks_are_not_compiled(how: str) -> None:
    """One graph for training and one for evaluation, as without hooks: what the hooks do stays outside."""
    if how != HOWS[0] and not graphs_of(hooked):
        pytest.skip("needs a compiler that takes models with hooks")
    found = graphs_of(lambda backend: together(1, lambda rank: run(how, backend, rank)))
    assert found == graphs_of(plain) >= 2


def test_one_graph_and_no_other() -> None:
    """fullgraph=True is for a model that was compiled before it was wrapped, and given as it is called."""
    torch.compiler.reset()
    options = {"compile_options": {"fullgraph": True}}
    how = "compiled, then wrapped"
    ours = together(1, lambda rank: run(how, "eager", rank, **options))
    assert ours == together(1, lambda rank: run(how, None, rank, **options))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("save", ["state_dict", "deepcopy", pytest.param("evaluate", marks=B_IS_SEEN)])
def test_the_original_of_a_given_compiled_model(save: str, workers: int) -> None:
    """People save the original, for its names without "_orig_mod.": that is x, too."""
    torch.compiler.reset()

    def fn(rank: int) -> None:
        c = Compiled("compiled, then wrapped", "eager")
        assert c.given is not c.model
        for step in range(2):
            train(c.called, c.optimizer, rank, step)
        assert c.held() != c.x()
        if save == "state_dict":
            assert bits(list(c.model.state_dict().values())) == c.x()
        elif save == "deepcopy":
            with c.optimizer.consensus():
                assert bits(list(copy.deepcopy(c.model).parameters())) == c.x()
        else:
            with torch.no_grad():
                c.model.eval()(batch(rank, 9))
            assert c.held() == c.x()

    together(workers, fn)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backend, with one worker: kernels read the parameters where they are."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    torch.compiler.reset()

    def fn(rank: int) -> None:
        c = Compiled("compiled, then wrapped", "inductor")
        for step in range(3):
            train(c.called, c.optimizer, rank, step)
            x, b = c.x(), c.held()
            twin = copy.deepcopy(c.model)
            with torch.no_grad(), c.optimizer.consensus():
                for mine, theirs in zip(twin.parameters(), c.model.parameters(), strict=True):
                    mine.copy_(theirs)
            with torch.no_grad():
                out = c.called.eval()(batch(9, step))
                assert c.held() == x
                torch.testing.assert_close(out, twin(batch(9, step)), rtol=1e-5, atol=1e-6)
                assert float((c.called.train()(batch(9, step)) - out).abs().max()) > 1e-4
                assert c.held() == b

    together(1, fn)
