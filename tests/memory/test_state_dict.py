"""state_dict() and load_state_dict(): a resumed run is the uninterrupted one, to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_saef import Compression, ConfigurationMismatchError
from tests.workers import NO_MODEL, Run, adamw, bits, caught, everything, saved, sgd, together

pytestmark = pytest.mark.filterwarnings(NO_MODEL)

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
DENSE: dict[str, Any] = {"compression": Compression.none, "feedback": "none"}
SETTINGS: dict[str, dict[str, Any]] = {
    "sharded": {},
    "ef, single-way": {"feedback": "ef", "double_compression": False},
    "averaging": {"averaging_period": 3, "server": "replicated", "server_step_ahead": 0.5},
    "in a round": {"local_steps": 3, "averaging_period": 2},
    "top-k in a round": {"local_steps": 4, "compression": Compression.topk(0.2), "feedback": "ef"},
    "warm-up": {"warmup_steps": 9, "step_ahead": 0.5},
    "blocks and buckets": {"block_size": 4, "bucket_bytes": 100},
    "bfloat16": {"dtype": torch.bfloat16, "local_steps": 2},
    "no feedback": {"feedback": "none", "skip": True, "on_nonfinite": "skip"},
    "dense": DENSE,
    "fp16": {"compression": Compression.fp16},
}
BEFORE, AFTER = 7, 5


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("evaluating", [False, True], ids=["", "evaluating"])
def test_a_resumed_run_continues(options: dict[str, Any], make: Make, evaluating: bool) -> None:
    options = dict(options)
    skip = options.pop("skip", False)

    def interrupted(rank: int) -> tuple[Any, list[Tensor], dict[str, bytes]]:
        run = Run(rank, make, **options).step(BEFORE)
        if skip:
            run.parameters[0].grad = torch.full_like(run.parameters[0], torch.inf)
            run.optimizer.step()
        parameters = [parameter.detach().clone() for parameter in run.parameters]
        if evaluating:
            run.optimizer.eval()
        state = saved(run.optimizer.state_dict())
        run.optimizer.train()
        return state, parameters, everything(run.step(AFTER))

    first = together(3, interrupted)

    def resumed(rank: int) -> dict[str, bytes]:
        state, parameters, _ = first[rank]
        run = Run(rank, make, seed=1 + rank, **options)
        if evaluating:
            run.optimizer.eval()
        run.optimizer.load_state_dict(state)
        if options.get("compression") is Compression.none:
            with torch.no_grad():
                for mine, theirs in zip(run.parameters, parameters, strict=True):
                    mine.copy_(theirs)
        run.optimizer.train()
        assert bits(run.parameters) == bits(parameters)
        assert bits(run.optimizer.state_dict()) == bits(state)
        run.taken = BEFORE
        return everything(run.step(AFTER))

    assert together(3, resumed) == [end for *_, end in first]


def test_a_state_dict_is_a_copy() -> None:
    def fn(rank: int) -> None:
        run = Run(rank, local_steps=2).step(3)
        state = run.optimizer.state_dict()["hvd_saef"]
        before = bits(state)
        run.step(2)
        assert bits(state) == before
        run.optimizer.load_state_dict(run.optimizer.state_dict() | {"hvd_saef": state})
        run.step(3)
        assert bits(state) == before

    together(2, fn)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_state_of_a_plain_optimizer(mode: str) -> None:
    """Without "hvd_saef", x is taken anew from the parameters, and errors start at zero."""

    def plain(rank: int) -> dict[str, bytes]:
        run = Run(rank, sgd, local_steps=3).step(4)  # in a round, with errors
        getattr(run.optimizer, mode)()
        state = run.optimizer.state_dict()
        del state["hvd_saef"]
        with torch.no_grad():
            for parameter in run.parameters:
                parameter.fill_(0.25)
        run.optimizer.load_state_dict(state)
        run.optimizer.train()
        run.taken = 4
        return everything(run.step(6))

    def fresh(rank: int) -> dict[str, bytes]:
        old = Run(rank, sgd, local_steps=3).step(4)
        run = Run(rank, sgd, local_steps=3)
        with torch.no_grad():
            for parameter in run.parameters:
                parameter.fill_(0.25)
        state = old.optimizer.state_dict()
        del state["hvd_saef"]
        run.optimizer.load_state_dict(state)
        run.taken = 4
        return everything(run.step(6))

    assert together(2, plain) == together(2, fresh)


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def spoil(ours: dict[str, Any]) -> None:
        for key in keys:
            del ours[key]

    return spoil


def replaced(key: str, name: str | None, value: Any) -> Callable[[dict[str, Any]], None]:
    def spoil(ours: dict[str, Any]) -> None:
        if name is None:
            ours[key] = value
        else:
            ours[key] = ours[key] | {name: value}

    return spoil


NAME, LAST = "noname.0.0", "noname.0.3"
SPOILT: dict[str, Callable[[dict[str, Any]], None]] = {
    **{f"no {key}": without(key) for key in ("version", "rounds", "x", "errors", "server_errors")},
    **{
        f"no {key}": without(key)
        for key in ("rank", "workers", "local_steps_done", "consolidated", "reached")
    },
    "version": replaced("version", None, 99),
    "shape of x": replaced("x", NAME, torch.ones(7, 5)),
    "shape of an error": replaced("errors", NAME, torch.ones(35)),
    "one x too many": replaced("x", "stranger", torch.ones(3)),
    "an x is missing": lambda ours: ours["x"].pop(LAST),
    "an error is missing": lambda ours: ours["errors"].pop(LAST),
    "a server error that is too long": replaced(
        "server_errors", NAME, {"start": 0, "values": torch.ones(36)}
    ),
    "a point of another shape": lambda ours: ours["reached"].__setitem__("noname.0.0", torch.ones(2)),
    "too few points": lambda ours: ours["reached"].popitem(),
    "no points in a round": replaced("reached", None, None),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_misfitting_state_changes_nothing(spoil: Callable[[dict[str, Any]], None]) -> None:
    def fn(rank: int, stumble: bool) -> dict[str, bytes]:
        run = Run(rank, sgd, local_steps=3, server="replicated").step(4)
        state = copy.deepcopy(run.optimizer.state_dict())
        run.step(1)
        if stumble:
            spoil(state["hvd_saef"])
            before = everything(run)
            with pytest.raises(ValueError, match="hvd_saef"):
                run.optimizer.load_state_dict(state)
            assert everything(run) == before
        return everything(run.step(3))

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


def test_torch_refuses_before_anything_changes() -> None:
    def fn(rank: int) -> None:
        run = Run(rank).step(3)
        state = run.optimizer.state_dict()
        state["param_groups"] = state["param_groups"] * 2
        run.step(1)
        before = everything(run)
        with pytest.raises(ValueError, match="parameter group"):
            run.optimizer.load_state_dict(state)
        assert everything(run) == before

    together(2, fn)


@pytest.mark.parametrize("given", [{}, DENSE], ids=["dense into compressed", "compressed into dense"])
def test_a_state_with_and_without_x_do_not_fit(given: dict[str, Any]) -> None:
    def fn(rank: int) -> None:
        run, other = Run(rank, **given), Run(rank, **({} if given else DENSE)).step(2)
        with pytest.raises(ValueError, match="hvd_saef"):
            run.optimizer.load_state_dict(other.optimizer.state_dict())

    together(2, fn)


def test_states_of_different_steps() -> None:
    def fn(rank: int) -> None:
        run = Run(rank)
        for step in range(4):
            if step == 2 + rank:
                state = run.optimizer.state_dict()
            run.step()
        run.optimizer.load_state_dict(state)
        run.step()

    for failure in caught(2, fn):
        assert isinstance(failure, ConfigurationMismatchError), repr(failure)
        assert "[(2, 0), (3, 0)]" in str(failure)
