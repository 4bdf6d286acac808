"""Parameter groups that are added, before and after training began, and models that are loaded anew."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from hvd_saef import Compression, ConfigurationMismatchError
from tests.workers import NO_MODEL, Job, Run, bits, caught, everything, together, warned

pytestmark = pytest.mark.filterwarnings(NO_MODEL)
DENSE: dict[str, Any] = {"compression": Compression.none, "feedback": "none"}
SETTINGS: list[dict[str, Any]] = [
    {},
    DENSE,
    {"server": "replicated", "server_step_ahead": 1.0},
    {"double_compression": False, "averaging_period": 3},
]


def first_half(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer of the first two parameters."""
    return torch.optim.SGD(parameters[:2], lr=0.05, momentum=0.9)


def halves(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Two groups."""
    groups: list[dict[str, Any]] = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.2}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


def grown(rank: int, before: int, **options: Any) -> Run:
    """A run whose second half joins after `before` steps."""
    run = Run(rank, first_half, **options).step(before)
    run.optimizer.add_param_group({"params": run.parameters[2:], "lr": 0.2})
    return run


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_added_before_the_first_step(options: dict[str, Any]) -> None:
    twin = together(3, lambda rank: everything(Run(rank, halves, **options).step(5)))
    assert together(3, lambda rank: everything(grown(rank, 0, **options).step(5))) == twin


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_added_after_training_began(options: dict[str, Any], workers: int) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        run = Run(rank, first_half, **options).step(4)
        before = copy.deepcopy(run.optimizer.state_dict()["hvd_saef"])
        run.optimizer.add_param_group({"params": run.parameters[2:], "lr": 0.2})
        after = run.optimizer.state_dict()["hvd_saef"]
        for name, error in before["errors"].items():
            assert torch.equal(after["errors"][name], error)
        for name, error in after["errors"].items():
            assert name in before["errors"] or not error.any()
        run.step(4)
        if options is not DENSE:
            assert run.ours("errors")["noname.1.1"].any()
        assert run.optimizer.stats()["rounds"] == 8
        run.optimizer.eval()
        return bits(run.parameters)

    first, *others = together(workers, fn)
    assert all(other == first for other in others)


def test_added_groups_train_as_torch_does() -> None:
    def fn(rank: int, wrapped: bool) -> list[torch.Tensor]:
        run = Run(rank, first_half, compression=Compression.none, step_ahead=0.0)
        if not wrapped:
            run.optimizer = run.inner
        run.step(3)
        run.optimizer.add_param_group({"params": run.parameters[2:], "lr": 0.2})
        return [parameter.detach() for parameter in run.step(3).parameters]

    ours, theirs = together(1, lambda rank: fn(rank, True))[0], together(1, lambda rank: fn(rank, False))[0]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)  # not to the bit: x - (x - y) rounds


def test_added_on_one_worker_only() -> None:
    def fn(rank: int) -> None:
        run = Run(rank, first_half).step(2)
        if rank == 1:
            run.optimizer.add_param_group({"params": run.parameters[2:]})
        run.step()

    for failure in caught(3, fn):
        assert isinstance(failure, ConfigurationMismatchError), repr(failure)
        assert "the number of parameters: 2 on ranks 0, 2, 4 on rank 1" in str(failure)


@pytest.mark.filterwarnings("ignore:a state without")
@pytest.mark.parametrize("what", ["a state", "a plain state"])
@pytest.mark.parametrize("call", ["step", "reanchor"])
def test_added_after_loading_on_one_worker_only(what: str, call: str) -> None:
    """Its buckets are others than those of the workers that were not loaded: all are told, and none waits."""

    def fn(rank: int) -> None:
        run = Run(rank, first_half).step(2)
        state = copy.deepcopy(run.optimizer.state_dict())
        if what == "a state":
            run = Run(rank, first_half)
        else:
            del state["hvd_saef"]
        if rank == 1:
            run.optimizer.load_state_dict(state)
        run.optimizer.add_param_group({"params": run.parameters[2:]})
        getattr(run if call == "step" else run.optimizer, call)()

    for failure in caught(3, fn):
        assert isinstance(failure, ConfigurationMismatchError), repr(failure)
        assert "add parameters before or after loading, on all ranks alike" in str(failure)


def test_added_where_it_cannot_be() -> None:
    def fn(rank: int) -> None:
        run = Run(rank, first_half, local_steps=3).step(2)
        with pytest.raises(RuntimeError, match=r"add_param_group between local steps: call flush\(\)"):
            run.optimizer.add_param_group({"params": run.parameters[2:]})
        assert len(run.optimizer.param_groups) == 1
        run.optimizer.flush()
        run.optimizer.add_param_group({"params": run.parameters[2:]})
        run.step(3)

    together(2, fn)


def test_added_behind_the_wrapper() -> None:
    def fn(rank: int) -> None:
        run = Run(rank, first_half).step(1)
        run.inner.add_param_group({"params": run.parameters[2:]})
        run.step()

    for failure in caught(2, fn):
        assert "add_param_group of what hvd_saef.DistributedOptimizer returned" in str(failure)


def trained(rank: int, **options: Any) -> Job:
    """A job with a small model."""
    return Job(rank, nn.Linear(3, 2), lambda parameters: torch.optim.SGD(parameters, lr=0.05), **options)


@pytest.mark.parametrize("ranks", [[0], [1], [0, 1, 2]])
def test_a_state_loaded_into_the_model_is_x(ranks: list[int]) -> None:
    new = {"weight": torch.full((2, 3), 0.25), "bias": torch.tensor([0.5, -0.5])}

    def fn(rank: int) -> dict[str, bytes]:
        run = trained(rank).step(3)
        if rank in ranks:
            run.model.load_state_dict(new)
            assert run.seen() == bits(new)
            assert run.optimizer.stats()["error_norm"] == 0
        with torch.no_grad():
            for group in run.optimizer.param_groups:
                group["lr"] = 0.0
        run.step()
        assert run.optimizer.stats()["error_norm"] == 0
        assert run.optimizer.stats()["rounds"] == 4
        assert run.seen() == bits(new)
        return run.seen()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a state was loaded into the model")
        together(3, fn)


def test_a_loaded_model_says_what_happened_to_the_errors() -> None:
    def fn(rank: int) -> None:
        run = trained(rank).step(2)
        state = copy.deepcopy(run.model.state_dict())
        run.model.load_state_dict(state)  # the x that it has: nothing happens
        assert run.optimizer.stats()["error_norm"] > 0
        run.step()
        run.model.load_state_dict(state)

    told = [text for _, text in warned(2, fn) if "loaded into the model" in text]
    assert len(told) == 2
    assert "errors are cleared" in told[0]


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("options", [{}, {"local_steps": 3}], ids=str)
def test_both_are_loaded_in_either_order(order: str, options: dict[str, Any]) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        run = trained(rank, **options).step(4)
        saved = copy.deepcopy({"optimizer": run.optimizer.state_dict(), "model": run.model.state_dict()})
        uninterrupted = run.step(4).seen()
        again = trained(rank, **options)
        again.taken = 4
        parts = [again.model, again.optimizer] if order == "model first" else [again.optimizer, again.model]
        for part in parts:
            part.load_state_dict(saved["model" if part is again.model else "optimizer"])
        assert again.step(4).seen() == uninterrupted
        return uninterrupted

    first, *others = together(3, fn)
    assert len(others) == 2
    if not options:
        assert all(other == first for other in others)
