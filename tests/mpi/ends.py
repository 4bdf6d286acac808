"""The end of a job in which hvd.init() started MPI, so that Horovod ends it on all ranks at once.

mpirun -np 4 python -m tests.mpi.ends HOW
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch

import hvd_saef
from hvd_saef.transport.find import find_communicator
from hvd_saef.transport.teams import TeamCommunicator
from hvd_saef.transport.watch import CALM, Watch
from tests.workers import network, train

LATE = 3.0
"""Seconds: long enough for a rank that is not late to shut Horovod down on all of them."""
HOWS: dict[str, Callable[[], None]] = {}


def how(function: Callable[[], None]) -> Callable[[], None]:
    """Register a way to end."""
    HOWS[function.__name__] = function
    return function


def train_then(last: Callable[[], None] = lambda: None, **options: Any) -> None:
    """Two steps, between which `last` is called; one rank is so late to wrap that the others ask for it."""
    if (
        hvd.rank() == hvd.size() - 1
    ):  # nobody may read what they ask, and MPICH does not end with unread messages
        time.sleep(3 * CALM)
    model = network()
    optimizer = hvd_saef.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model=model, **options
    )
    train(model, optimizer, hvd.rank(), 0)
    last()
    train(model, optimizer, hvd.rank(), 1)


def within_a_collective() -> None:
    """Let all ranks but 0 find out late that what they wait for is done."""
    wait = Watch.wait
    start = time.monotonic()

    def wait_longer(watch: Watch, done: Callable[[], bool], *arguments: Any) -> None:
        wait(watch, lambda: time.monotonic() > start + LATE and done(), *arguments)

    if hvd.rank():
        Watch.wait = wait_longer  # type: ignore[method-assign, assignment]


def before_a_collective() -> None:
    """Let the ranks of the second node come late to what these two do among themselves."""
    put_together = TeamCommunicator._put_together

    def put_together_later(*arguments: Any) -> None:
        time.sleep(LATE)
        put_together(*arguments)

    if hvd.rank() >= 2:
        TeamCommunicator._put_together = put_together_later  # type: ignore[method-assign, assignment]


@how
def shutdown() -> None:
    train_then(within_a_collective)
    hvd.shutdown()


@how
def exit() -> None:  # noqa: A001
    train_then(within_a_collective)


@how
def nodes() -> None:
    train_then(before_a_collective, worker=[[0, 1], [2, 3]])
    hvd.shutdown()


@how
def too_early() -> None:
    def leave() -> None:
        if hvd.rank() == 0:
            wait_until_others_wait()
            hvd.shutdown()
            sys.exit()

    train_then(leave)


def wait_until_others_wait() -> None:
    """Until all other ranks have said that they wait for this one, in the next call."""
    watch = find_communicator()[0]._watch  # type: ignore[attr-defined]
    own = watch._calls["WORDS"].number
    waiting: set[int] = set()
    while len(waiting) < hvd.size() - 1:
        time.sleep(0.05)
        watch._listen()
        waiting = {rank for rank, calls in watch._heard.items() if calls["WORDS"].number > own}


if __name__ == "__main__":
    hvd.init(process_sets="dynamic")
    assert "mpi4py" not in sys.modules  # it was Horovod that started MPI
    HOWS[sys.argv[1]]()
    print(f"rank {hvd.rank() if hvd.is_initialized() else 'after shutdown'} comes to its end", flush=True)
