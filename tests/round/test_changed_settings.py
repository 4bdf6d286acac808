"""States loaded under other settings than they were saved with: nothing is lost, or it is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_saef import CheckpointError, Compression, load_checkpoint, save_checkpoint
from hvd_saef.checkpoints.redistribution import mean_state
from tests.workers import NO_MODEL, Run, bits, caught, saved, together, warned

pytestmark = pytest.mark.filterwarnings(NO_MODEL, "ignore:the largest block")

SINGLE: dict[str, Any] = {"double_compression": False}
BETA: dict[str, Any] = {"server": "replicated", "server_step_ahead": 1.0}
SIGN_ALONE: dict[str, Any] = {"feedback": "none"}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "double-way to single": ({}, SINGLE),
    "double-way, replicated, to single": ({"server": "replicated"}, SINGLE),
    "double-way, beta, to single": (BETA, SINGLE),
    "double-way ef to single saef": ({"feedback": "ef"}, SINGLE),
    "single-way to double": (SINGLE, {}),
    "single-way to double, beta": (SINGLE, BETA),
    "sharded to replicated": ({"server": "sharded"}, {"server": "replicated"}),
    "replicated to sharded": ({"server": "replicated"}, {"server": "sharded"}),
    "saef to ef": ({}, {"feedback": "ef"}),
    "ef to saef": ({"feedback": "ef"}, {}),
    "alpha": ({"step_ahead": 0.25}, {"step_ahead": 0.75}),
    "beta to none": (BETA, {}),
    "none to beta": ({}, BETA),
    "sign to top-k": ({}, {"compression": Compression.topk(0.2)}),
    "top-k to sign": ({"compression": Compression.topk(0.2)}, {}),
    "sign to dense": ({}, {"compression": Compression.none}),
    "dense below": ({}, {"dense_below": 10}),
    "blocks": ({}, {"block_size": 4}),
    "no blocks": ({"block_size": 4}, {}),
    "buckets": ({}, {"bucket_bytes": 100}),
    "warm-up": ({}, {"warmup_steps": 20}),
    "averaging": ({}, {"averaging_period": 3}),
    "no feedback to saef": (SIGN_ALONE, {}),
}


def plain_sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD that moves nothing at a rate of 0."""
    return torch.optim.SGD(parameters, lr=0.05)


def auxiliary(states: list[dict[str, Any]], weights: list[float] | None = None) -> list[Tensor]:
    """x̃ = x - (s + mean e), less the mean of what local steps since the round began moved."""
    weights = weights or [1 / len(states)] * len(states)
    found = []
    for name, x in states[0]["x"].items():
        s = torch.zeros_like(x).flatten()
        for state in states:
            if (piece := state["server_errors"].get(name)) is not None:
                s[piece["start"] : piece["start"] + piece["values"].numel()] = piece["values"]
        s, total = s.view_as(x), x.clone() - s.view_as(x)
        for state, weight in zip(states, weights, strict=True):
            total -= weight * state["errors"][name]
            if state["reached"] is not None:
                alpha, beta = (state["settings"][key] for key in ("alpha", "beta"))
                total -= weight * (x - alpha * state["errors"][name] - beta * s - state["reached"][name])
        found.append(total)
    return found


def fresh(rank: int, steps: int = 1, **options: Any) -> Run:
    return Run(rank, plain_sgd, dtype=torch.float64, local_steps=steps, check_consensus_every=1, **options)


@pytest.mark.parametrize("steps", [(1, 1), (3, 3), (3, 1), (1, 3)], ids=str)
@pytest.mark.parametrize(("before", "after"), CHANGES.values(), ids=CHANGES)
def test_x_tilde_is_kept(before: dict[str, Any], after: dict[str, Any], steps: tuple[int, int]) -> None:
    """Right after loading, when saved again before the first step, and in the rounds after it."""
    states = together(3, lambda rank: saved(fresh(rank, steps[0], **before).step(4).optimizer.state_dict()))
    expected = auxiliary([state["hvd_saef"] for state in states])
    assert (states[0]["hvd_saef"]["reached"] is not None) == (steps[0] == 3)
    seen: list[list[Any]] = []

    def fn(rank: int) -> list[Any]:
        run = fresh(rank, steps[1], **after)
        run.optimizer.load_state_dict(copy.deepcopy(states[rank]))
        found = [copy.deepcopy(run.optimizer.state_dict()["hvd_saef"])]
        run.optimizer.param_groups[0]["lr"] = 0.0
        for _ in range(4):
            run.step(1)
            found.append(run.optimizer.state_dict()["hvd_saef"])
        return found

    told = warned(3, lambda rank: seen.append(fn(rank)))
    assert not [text for _, text in told if "hold" in text or "lost" in text], told
    seen.sort(key=lambda found: found[0]["rank"])
    for when in zip(*seen, strict=True):
        for found, wanted in zip(auxiliary(list(when)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    for rank in range(3):
        assert bits({k: v for k, v in seen[rank][0].items() if k != "server_errors"}) == bits(
            {k: v for k, v in states[rank]["hvd_saef"].items() if k != "server_errors"}
        )


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "to no feedback": ({}, SIGN_ALONE, "compression errors, which feedback='none' would drop"),
    "to averaged gradients": (
        {},
        SIGN_ALONE | {"compression": Compression.none},
        "this optimizer is wrapped with feedback='none' and a dense compressor",
    ),
    "from averaged gradients": (
        SIGN_ALONE | {"compression": Compression.none},
        {},
        "it was saved with feedback='none' and a dense compressor",
    ),
}


@pytest.mark.parametrize(("before", "after", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(before: dict[str, Any], after: dict[str, Any], words: str, tmp_path: Any) -> None:
    """As a state dict and as a checkpoint; nothing changes, and the way round that is told works."""

    def fn(rank: int) -> None:
        old = fresh(rank, **before).step(3)
        state = saved(old.optimizer.state_dict())
        model = nn.ParameterList(old.parameters)
        save_checkpoint(tmp_path, model, old.optimizer)
        run = fresh(rank, **after).step(1)
        with pytest.raises(ValueError, match=words):
            run.optimizer.load_state_dict(state)
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(tmp_path, nn.ParameterList(run.parameters), run.optimizer)
        assert run.optimizer.stats()["rounds"] == 1
        del state["hvd_saef"]
        with old.optimizer.consensus(), torch.no_grad():
            for mine, theirs in zip(run.parameters, old.parameters, strict=True):
                mine.copy_(theirs)
            expected = bits(old.parameters)
        run.optimizer.load_state_dict(state)
        run.optimizer.eval()
        assert bits(run.parameters) == expected
        run.optimizer.train()
        run.step(2)

    together(2, fn)


def test_from_averaged_gradients_to_local_steps() -> None:
    """H = 1 averages gradients and H = 2 keeps x: the same refusal."""
    dense = {"feedback": "none", "compression": Compression.none}

    def fn(rank: int) -> None:
        state = saved(fresh(rank, 1, **dense).step(2).optimizer.state_dict())
        fresh(rank, 2, **dense).optimizer.load_state_dict(state)

    for failure in caught(2, fn):
        assert "it was saved with feedback='none' and a dense compressor" in str(failure)


@pytest.mark.parametrize("steps", [1, 3])
def test_workers_that_count_otherwise(steps: int) -> None:
    """Errors count by the number of ranks: e is scaled, so that the weighted mean stays."""
    equal: dict[str, Any] = {"worker": [[0, 1], [2, 3]]}
    ranks: dict[str, Any] = {"worker": [[0, 1, 2], [3]], "weights": "ranks"}
    states = together(4, lambda rank: saved(fresh(rank, steps, **equal).step(4).optimizer.state_dict()))
    expected = auxiliary([states[rank]["hvd_saef"] for rank in (0, 2)])

    def fn(rank: int) -> dict[str, Any]:
        run = fresh(rank, steps, **ranks)
        run.optimizer.load_state_dict(copy.deepcopy(states[3 if rank == 3 else 0]))
        run.optimizer.param_groups[0]["lr"] = 0.0
        return dict(run.step(1).optimizer.state_dict()["hvd_saef"])

    found = together(4, fn)
    for mine, wanted in zip(auxiliary([found[0], found[3]], [0.75, 0.25]), expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*on_mismatch:UserWarning")
@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("options", [{}, BETA, {"feedback": "ef"}, SINGLE, SIGN_ALONE], ids=str)
def test_local_steps_go_on_with_other_workers(options: dict[str, Any], workers: int, tmp_path: Path) -> None:
    """Saved in the middle of a round by three, loaded by others, or by three of which one's file is lost."""

    def save(rank: int) -> Any:
        run = fresh(rank, 3, **options).step(5)
        save_checkpoint(tmp_path, nn.ParameterList(run.parameters), run.optimizer)
        return saved(run.optimizer.state_dict())

    states = [state["hvd_saef"] for state in together(3, save)]
    assert states[0]["local_steps_done"] == 2
    if workers == 3:
        next(tmp_path.glob("*-rank00002.pt")).unlink()
        del states[2]
    expected = auxiliary(states)  # without the part of a sharded s that is lost with a file

    def load(rank: int) -> Any:
        run = fresh(rank, 3, **options)
        model = nn.ParameterList(run.parameters)
        load_checkpoint(tmp_path, model, run.optimizer, on_mismatch="redistribute")
        return run.optimizer.state_dict()["hvd_saef"]

    found = together(workers, load)
    assert found[0]["local_steps_done"] == 0
    for mine, wanted in zip(auxiliary(found), expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:only rank 0 was loaded")
@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize(("before", "after"), CHANGES.values(), ids=CHANGES)
def test_rank_0_alone_under_other_settings(before: dict[str, Any], after: dict[str, Any], more: int) -> None:
    """Saved after consolidate(), at a round's start or some local steps later: x̃ of rank 0 is everyone's."""

    def save(rank: int) -> Any:
        run = fresh(rank, 3, **before).step(4)
        run.optimizer.consolidate()
        return saved(run.step(more).optimizer.state_dict())

    state = together(3, save)[0]
    expected = auxiliary([state["hvd_saef"]])

    def fn(rank: int) -> list[Any]:
        run = fresh(rank, 1, **after)
        if rank == 0:
            run.optimizer.load_state_dict(copy.deepcopy(state))
        run.optimizer.param_groups[0]["lr"] = 0.0
        return [run.step(1).optimizer.state_dict()["hvd_saef"] for _ in range(3)]

    for when in zip(*together(3, fn), strict=True):
        for found, wanted in zip(auxiliary(list(when)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("change", ["double-way to single", "blocks", "replicated to sharded", "saef to ef"])
def test_parameters_added_before_the_first_step(change: str) -> None:
    """What joins between loading and the first step has no errors, and costs the others none."""
    before, after = CHANGES[change]
    states = together(3, lambda rank: saved(fresh(rank, 1, **before).step(4).optimizer.state_dict()))
    expected = auxiliary([state["hvd_saef"] for state in states])

    def fn(rank: int) -> Any:
        run = fresh(rank, 1, **after)
        run.optimizer.load_state_dict(copy.deepcopy(states[rank]))
        late = nn.Parameter(torch.full((6,), 2.0, dtype=torch.float64))
        run.optimizer.add_param_group({"params": [late]})
        run.optimizer.param_groups[0]["lr"] = 0.0
        return run.step(1).optimizer.state_dict()["hvd_saef"]

    seen: list[Any] = []
    told = warned(3, lambda rank: seen.append(fn(rank)))
    assert not [text for _, text in told if "hold" in text], told
    seen.sort(key=lambda found: found["rank"])
    found = auxiliary(seen)
    assert len(found) == len(expected) + 1
    for mine, wanted in zip(found, expected, strict=False):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loaded", [[0], [0, 1]], ids=str)
@pytest.mark.parametrize("change", ["double-way to single", "alpha"])
def test_saved_again_before_the_next_round(change: str, loaded: list[int]) -> None:
    """What became a part of the errors is neither counted twice nor taken for everyone's."""
    before, after = CHANGES[change]

    def save(rank: int) -> Any:
        run = fresh(rank, 3, **before).step(4)
        run.optimizer.consolidate()
        return saved(run.step(2).optimizer.state_dict())

    states = together(2, save)

    def go_on(rank: int) -> Any:
        run = fresh(rank, 3, **after)
        if rank in loaded:
            run.optimizer.load_state_dict(copy.deepcopy(states[rank]))
        run.optimizer.param_groups[0]["lr"] = 0.0
        run.step(1)
        return saved(run.optimizer.state_dict())

    again = together(2, go_on)

    def fn(rank: int) -> Any:
        run = fresh(rank, 3, **after)
        run.optimizer.load_state_dict(copy.deepcopy(again[rank]))
        return run.step(0).optimizer.flush() or run.optimizer.state_dict()["hvd_saef"]

    expected = auxiliary([state["hvd_saef"] for state in again])
    at_first = auxiliary([states[rank]["hvd_saef"] for rank in loaded])
    for mine, wanted, first in zip(auxiliary(together(2, fn)), expected, at_first, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(mine, first, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loaded", [[0], [0, 1]], ids=str)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_consolidated_state_without_a_server(steps: int, loaded: list[int]) -> None:
    """With one, s is 0: what is saved again holds all of it, so nothing is told to be lost."""

    def save(rank: int) -> Any:
        run = fresh(rank, 3, **SINGLE).step(3)
        run.optimizer.consolidate()
        return saved(run.optimizer.state_dict())

    states = together(2, save)

    def fn(rank: int) -> None:
        run = fresh(rank, 3)
        if rank in loaded:
            run.optimizer.load_state_dict(copy.deepcopy(states[rank]))
        run.step(steps)
        state = saved(run.optimizer.state_dict())
        again = fresh(rank, 3)
        if rank in loaded:
            again.optimizer.load_state_dict(state)
        again.optimizer.flush()

    told = [text for _, text in warned(2, fn) if "hold" in text]
    assert not [text for text in told if "server" in text], told


def test_another_workers_state_saved_again_stays_another_workers() -> None:
    """Before the next step, which clears the errors: they are not taken for the worker's own."""
    states = together(2, lambda rank: saved(fresh(rank).step(3).optimizer.state_dict()))

    def fn(rank: int) -> tuple[Any, Any]:
        run = fresh(rank)
        run.optimizer.load_state_dict(copy.deepcopy(states[0]))
        state = saved(run.optimizer.state_dict())
        again = fresh(rank)
        again.optimizer.load_state_dict(copy.deepcopy(state))
        again.optimizer.flush()
        return state["hvd_saef"]["rank"], again.optimizer.stats()["error_norm"]

    seen: list[Any] = []
    told = warned(2, lambda rank: seen.append(fn(rank)))
    assert seen == [(0, 0.0), (0, 0.0)]
    assert [text for _, text in told if "does not hold all of the workers' errors" in text]


def test_a_state_that_does_not_say_its_settings() -> None:
    """As earlier versions wrote them: taken as saved under the settings there are; to the bit if so."""

    def fn(rank: int) -> None:
        run = fresh(rank, 3, server="replicated").step(4)
        state = saved(run.optimizer.state_dict())
        del state["hvd_saef"]["settings"]
        again = fresh(rank, 3, server="replicated")
        again.optimizer.load_state_dict(copy.deepcopy(state))
        again.taken = 4
        assert bits(again.step(4).optimizer.state_dict()) == bits(run.step(4).optimizer.state_dict())
        with pytest.warns(UserWarning, match="local steps since the last round are dropped"):
            merged = mean_state(iter([copy.deepcopy(state)]), 2)
        assert bits(merged["hvd_saef"]["errors"]) == bits(state["hvd_saef"]["errors"])

    together(1, fn)
