"""Resuming on rank 0 alone, or on another number of workers: what is kept, and that x stays one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_saef import Compression
from tests.workers import NO_MODEL, Run, bits, saved, together, warned

pytestmark = [
    pytest.mark.both_arithmetics,
    pytest.mark.filterwarnings(NO_MODEL, "ignore:only rank:UserWarning"),
]

SETTINGS: dict[str, dict[str, Any]] = {
    "sharded": {},
    "ef, single-way": {"feedback": "ef", "double_compression": False},
    "replicated": {"averaging_period": 4, "server": "replicated", "server_step_ahead": 0.5},
    "in a round": {"local_steps": 3, "averaging_period": 2},
    "in a round, replicated": {
        "local_steps": 4,
        "compression": Compression.topk(0.2),
        "server": "replicated",
    },
    "bfloat16": {"dtype": torch.bfloat16, "local_steps": 2},
    "no feedback": {"feedback": "none"},
    "dense": {"compression": Compression.none, "feedback": "none"},
}


def stopped(rank: int, consolidated: bool, **options: Any) -> tuple[Any, list[Tensor]]:
    """The state dict and x after some steps, with consolidate() after them if asked, else long before."""
    run = Run(rank, **options).step(2)
    run.optimizer.consolidate()
    run.step(5)
    if consolidated:
        run.optimizer.consolidate()
    state = saved(run.optimizer.state_dict())
    run.optimizer.eval()
    return state, [parameter.detach().clone() for parameter in run.parameters]


def resumed(rank: int, states: list[tuple[Any, list[Tensor]]], **options: Any) -> Run:
    """A fresh run, loaded on rank 0 alone; parameters and torch's state are as after Horovod's broadcasts."""
    run = Run(rank, seed=1 + rank, **options)
    state = copy.deepcopy(states[0][0])  # torch would share its tensors
    if rank != 0:
        del state["hvd_saef"]
    run.optimizer.load_state_dict(state)
    with torch.no_grad():
        for mine, theirs in zip(run.parameters, states[0][1], strict=True):
            mine.copy_(theirs)
    run.taken = 7
    return run


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_flush_after_the_broadcasts_takes_everyone_to_b(options: dict[str, Any]) -> None:
    """Then rank 0's consolidated state goes on to the bit; else one gradient is taken elsewhere."""
    states = together(3, lambda rank: stopped(rank, True, **options))

    def on(rank: int, how: str) -> dict[str, bytes]:
        run = resumed(rank, states, **options)
        if how == "all loaded":
            run.optimizer.load_state_dict(copy.deepcopy(states[0][0]))
        if how == "flush":
            run.optimizer.flush()
        return bits(run.step(3).parameters)

    everyone = together(3, lambda rank: on(rank, "all loaded"))
    assert together(3, lambda rank: on(rank, "flush")) == everyone
    if options.get("feedback", "saef") == "saef":
        assert together(3, lambda rank: on(rank, "")) != everyone


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_only_rank_0_is_resumed(options: dict[str, Any], consolidated: bool) -> None:
    replicated = options.get("server") == "replicated" or options.get("double_compression") is False
    states = together(3, lambda rank: stopped(rank, consolidated, **options))
    ours = states[0][0]["hvd_saef"]

    def fn(rank: int) -> dict[str, bytes]:
        run = resumed(rank, states, on_nonfinite="skip", **options)
        run.parameters[0].grad = torch.full_like(run.parameters[0], torch.nan)
        run.optimizer.step()  # is skipped, but settles where x, e and s come from
        now = run.optimizer.state_dict()["hvd_saef"]
        assert bits(now["x"]) == bits(ours["x"])
        assert now["rounds"] == ours["rounds"]
        if consolidated:
            assert bits(now["errors"]) == bits(ours["errors"])
        elif ours["reached"] is None:
            assert run.optimizer.stats()["error_norm"] == 0
        else:  # rank 0's local steps since the last round
            alpha = float(options.get("feedback", "saef") == "saef")
            beta = options.get("server_step_ahead", 0.0)
            for name, x in ours["x"].items():
                s = torch.zeros_like(x)
                if beta:
                    s = ours["server_errors"][name]["values"].view_as(x)
                b = x - alpha * ours["errors"][name] - beta * s
                taken = b.to(ours["reached"][name].dtype).to(x.dtype) - ours["reached"][name].to(x.dtype)
                assert bits(now["errors"][name]) == bits(taken)
                assert taken.any()
        if replicated:
            assert bits(now["server_errors"]) == bits(ours["server_errors"])
        elif consolidated:
            for name, piece in now["server_errors"].items():
                whole = ours["server_errors"][name]
                assert whole["start"] == 0
                stop = piece["start"] + piece["values"].numel()
                assert bits(piece["values"]) == bits(whole["values"][piece["start"] : stop].clone())
        else:
            assert run.optimizer.stats()["server_error_norm"] == 0
        run.step(3 if options.get("local_steps") != 4 else 4)
        assert run.optimizer.stats()["rounds"] > ours["rounds"]
        run.optimizer.eval()
        return bits(run.parameters)

    first, *others = together(3, fn)
    assert all(other == first for other in others)


@pytest.mark.parametrize("method", ["flush", "consolidate"])
def test_collective_methods_before_the_first_step_settle_first(method: str) -> None:
    """Rank 0 was saved within a round; the others, fresh, are at a round's start."""
    options = {"local_steps": 3}
    states = together(2, lambda rank: stopped(rank, False, **options))

    def fn(rank: int) -> dict[str, bytes]:
        run = resumed(rank, states, **options)
        getattr(run.optimizer, method)()
        return bits(run.step(3).x())

    first, second = together(2, fn)
    assert first == second


@pytest.mark.parametrize(("workers", "server"), [(2, "auto"), (2, "sharded"), (3, "replicated"), (4, "auto")])
def test_a_sharded_state_for_other_workers_does_not_split_x(workers: int, server: Any) -> None:
    """Whoever loads whatever part of s: x stays one, or an error says that the state does not fit."""
    states = together(3, lambda rank: saved(Run(rank, server="sharded").step(5).optimizer.state_dict()))

    def fn(rank: int) -> dict[str, bytes] | None:
        run = Run(rank, server=server)
        try:
            run.optimizer.load_state_dict(states[rank % 3])
        except ValueError:
            return None
        return bits(run.step(4).x())

    first, *others = together(workers, fn)
    assert all(other == first for other in others)


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("server", ["replicated", "sharded"])
def test_what_is_lost_is_told_once(consolidated: bool, server: str) -> None:
    def fn(rank: int) -> None:
        run = Run(rank, server=server).step(3)
        if consolidated:
            run.optimizer.consolidate()
        if rank == 0:
            run.optimizer.load_state_dict(run.optimizer.state_dict())
        run.step()

    told = [(rank, text) for rank, text in warned(3, fn) if "only rank 0 was loaded" in text]
    assert len(told) == (0 if consolidated else 1)
    for rank, text in told:
        assert rank == 0
        assert ("the workers' errors" in text) is not consolidated
        assert ("the sharded server's error" in text) is (server == "sharded")


@pytest.mark.parametrize("consolidated", [False, True])
def test_rank_0s_state_loaded_by_all(consolidated: bool) -> None:
    """As with hvd.broadcast_object: one worker's errors are not everyone's, unless they were averaged."""
    states = together(3, lambda rank: stopped(rank, consolidated, server="replicated"))

    def fn(rank: int) -> None:
        run = Run(rank, server="replicated", on_nonfinite="skip")
        run.optimizer.load_state_dict(copy.deepcopy(states[0][0]))
        run.parameters[0].grad = torch.full_like(run.parameters[0], torch.nan)
        run.optimizer.step()
        assert (run.optimizer.stats()["error_norm"] > 0) is consolidated
        assert run.optimizer.stats()["server_error_norm"] > 0

    told = [text for _, text in warned(3, fn) if "the workers' errors" in text]
    assert len(told) == (0 if consolidated else 1)


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("how", ["rank 0 alone", "rank 0's on all"])
@pytest.mark.parametrize("options", [{}, {"feedback": "ef"}, {"feedback": "none"}], ids=str)
def test_local_steps_of_rank_0_are_kept_and_the_others_told_of(
    options: dict[str, Any], how: str, consolidated: bool
) -> None:
    """Saved in the middle of a round: what rank 0's local steps did goes on, on all workers."""
    options = options | {"local_steps": 3, "server": "replicated", "dtype": torch.float64}

    def save(rank: int) -> Any:
        run = Run(rank, **options).step(3)
        if consolidated:
            run.optimizer.consolidate()
        return saved(run.step(2).optimizer.state_dict())

    state = together(2, save)[0]
    ours = state["hvd_saef"]
    assert ours["local_steps_done"] == 2

    def fn(rank: int) -> None:
        run = Run(rank, on_nonfinite="skip", **options)
        if rank == 0 or how != "rank 0 alone":
            run.optimizer.load_state_dict(copy.deepcopy(state))
        run.parameters[0].grad = torch.full_like(run.parameters[0], torch.nan)
        run.optimizer.step()  # is skipped, but settles where x, e and s come from
        now = run.optimizer.state_dict()["hvd_saef"]
        alpha = ours["settings"]["alpha"]
        for name, x in ours["x"].items():
            done = x - alpha * ours["errors"][name] - ours["reached"][name]
            kept = now["errors"][name]
            if now["reached"] is not None:
                kept = x - alpha * now["errors"][name] - now["reached"][name]
            elif consolidated:
                kept = kept - ours["errors"][name]
            torch.testing.assert_close(kept, done, rtol=0, atol=1e-14)

    told = [text for rank, text in warned(2, fn) if "hold" in text]
    if how == "rank 0 alone" or not consolidated:
        assert len(told) == 1
        assert "the other workers' local steps since the last round" in told[0]
        assert ("the workers' errors" in told[0]) is not consolidated
    else:  # what consolidate() gave and everyone loads is everyone's, by its word
        assert not told


@pytest.mark.parametrize("server", ["replicated", "sharded"])
def test_what_consolidate_knew_is_forgotten_where_errors_are_cleared(server: Any) -> None:
    """A state saved after consolidate() and reanchor() holds no error; it held the whole of the old s."""

    def fn(rank: int) -> None:
        run = Run(rank, server=server).step(2)
        run.optimizer.consolidate()
        assert any(piece["values"].any() for piece in run.ours("server_errors").values())
        run.optimizer.reanchor()
        assert not run.ours("consolidated")
        assert not any(piece["values"].any() for piece in run.ours("server_errors").values())

    together(2, fn)


def test_only_who_was_loaded_stays_consolidated() -> None:
    """The others have the s that was consolidated there, not the one that they knew themselves."""

    def fn(rank: int) -> None:
        run = Run(rank, server="replicated").step(2)
        run.optimizer.consolidate()
        earlier = saved(run.optimizer.state_dict())
        run.step()
        run.optimizer.consolidate()
        if rank == 0:
            run.optimizer.load_state_dict(earlier)
        run.optimizer.flush()  # agrees, and completes nothing
        for name, piece in run.ours("server_errors").items():
            assert torch.equal(piece["values"], earlier["hvd_saef"]["server_errors"][name]["values"])

    together(2, fn)
