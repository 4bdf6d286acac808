"""run_workers: K workers as threads, none of which hangs, whatever another one does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hvd_saef import Compression, SaefError, WorkerError, run_workers
from tests.workers import DEADLINE, NO_MODEL, Run, bits, caught, everything, sgd, together

pytestmark = [pytest.mark.both_arithmetics, pytest.mark.filterwarnings(NO_MODEL)]


def test_results_come_in_rank_order() -> None:
    turns = [threading.Event() for _ in range(5)]

    def fn(rank: int) -> tuple[int, str]:
        if rank + 1 < 5:
            assert turns[rank + 1].wait(DEADLINE)  # the last one ends first
        turns[rank].set()
        return rank, threading.current_thread().name

    results = run_workers(5, fn)
    assert [rank for rank, _ in results] == [0, 1, 2, 3, 4]
    assert len({thread for _, thread in results} | {threading.current_thread().name}) == 6


def test_workers_find_each_other_and_runs_do_not_mix() -> None:
    def fn(rank: int) -> Any:
        return everything(Run(rank).step(3))

    alone, pair = together(1, fn), together(2, fn)
    nested = together(2, lambda rank: together(2, fn) if rank else together(1, fn))
    assert nested == [alone, pair]
    assert pair[0] != alone[0]
    assert together(2, fn) == pair


def test_two_optimizers_of_a_worker_are_apart() -> None:
    def fn(rank: int) -> tuple[Any, Any]:
        one, two = Run(rank), Run(rank, seed=1, feedback="ef", local_steps=2)
        for _ in range(4):
            one.step()
            two.step()
        return everything(one), everything(two)

    def apart(rank: int) -> tuple[Any, Any]:
        return everything(Run(rank).step(4)), everything(
            Run(rank, seed=1, feedback="ef", local_steps=2).step(4)
        )

    assert together(2, fn) == together(2, apart)


class Accident(BaseException):
    """Neither an Exception nor anything that anyone would handle by mistake."""


@pytest.mark.parametrize("error", [KeyError("oops"), Accident("oops"), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("who", [0, 2])
def test_an_exception_ends_all_and_is_raised(error: BaseException, when: int, who: int) -> None:
    ended: list[int] = []
    threads = threading.active_count()

    def fn(rank: int) -> None:
        try:
            run = Run(rank)
            for step in range(5):
                if (step, rank) == (when, who):
                    raise error
                run.step()
        finally:
            ended.append(rank)

    with pytest.raises(type(error)) as seen:
        together(3, fn)
    assert seen.value is error
    assert sorted(ended) == [0, 1, 2]
    assert threading.active_count() <= threads


def test_a_worker_that_returns_early_does_not_hang_the_others() -> None:
    def fn(rank: int) -> str:
        run = Run(rank).step(2)
        if rank == 1:
            return "early"
        with pytest.raises(SaefError, match=f"worker 1 has ended, and worker {rank} waits"):
            run.step()
        return "late"

    assert together(3, fn) == ["late", "early", "late"]
    with pytest.raises(SaefError, match="worker 1 has ended"):
        together(3, lambda rank: None if rank == 1 else Run(rank).step() and None)


def test_different_collectives_at_once_raise() -> None:
    def fn(rank: int) -> None:
        run = Run(rank).step(2)
        if rank == 1:
            run.optimizer.reanchor()
        else:
            run.optimizer.step()

    for failure in caught(3, fn):
        assert isinstance(failure, SaefError)
        assert "different collectives" in str(failure)


@pytest.mark.parametrize("who", [{1}, {0, 2}, {0, 1, 2}])
def test_an_exception_in_a_closure(who: set[int]) -> None:
    """The worker raises its own, the others are told whose; nothing has happened, and all can go on."""

    def failing() -> float:
        raise ZeroDivisionError("no batch")

    def fn(rank: int, stumble: bool) -> dict[str, bytes]:
        run = Run(rank).step(3)
        if stumble:
            run.set_gradients()
            before = everything(run)
            error = ZeroDivisionError if rank in who else WorkerError
            words = ".*".join(f"rank {k} raised ZeroDivisionError: no batch" for k in sorted(who))
            closure: Callable[[], float] = failing if rank in who else lambda: 1.0
            with pytest.raises(error, match="no batch" if rank in who else words):
                run.optimizer.step(closure)
            assert everything(run) == before
        return everything(run.step(2))

    assert together(3, lambda rank: fn(rank, True)) == together(3, lambda rank: fn(rank, False))


def test_a_sparse_gradient_on_one_worker_raises_on_all() -> None:
    def fn(rank: int, as_dense: bool) -> dict[str, bytes]:
        run = Run(rank, sparse_as_dense=as_dense, compression=Compression.none, feedback="none")
        run.set_gradients()
        gradient = run.parameters[0].grad
        if rank == 1 and gradient is not None:
            run.parameters[0].grad = gradient.to_sparse()
        run.optimizer.step()
        return bits(run.parameters)

    raised = caught(2, lambda rank: fn(rank, False))
    assert isinstance(raised[0], WorkerError)
    assert "rank 1 raised TypeError" in str(raised[0])
    assert isinstance(raised[1], TypeError)
    assert "'noname.0.0'" in str(raised[1])
    assert "sparse_as_dense=True" in str(raised[1])
    dense: dict[str, Any] = {"compression": Compression.none, "feedback": "none"}
    expected = together(2, lambda rank: bits(Run(rank, **dense).step().parameters))
    assert together(2, lambda rank: fn(rank, True)) == expected


def test_one_worker_without_compression_is_plain_training() -> None:
    def fn(rank: int) -> None:
        run = Run(rank, compression=Compression.none, dtype=torch.float64)
        plain = [nn.Parameter(parameter.detach().clone()) for parameter in run.parameters]
        optimizer = sgd(plain)
        for _ in range(8):
            run.step()
            for mine, theirs in zip(run.parameters, plain, strict=True):
                theirs.grad = None if mine.grad is None else mine.grad.clone()
            optimizer.step()
            for mine, theirs in zip(run.parameters, plain, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)

    together(1, fn)
