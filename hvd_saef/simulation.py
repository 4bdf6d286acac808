"""Runs K workers as threads of one process; only the communicator's code differs from a real job's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

from hvd_saef.errors import StalledExchangeError, WorkerError
from hvd_saef.transport.find import set_thread_communicator
from hvd_saef.transport.threads import Meetings, ThreadCommunicator
from hvd_saef.transport.watch import CALM, LOOK

T = TypeVar("T")


def run_workers(workers: int, fn: Callable[[int], T], *, ranks: int | Sequence[int] = 1) -> list[T]:
    """Calls `fn(rank)` in `workers` threads and returns what the calls returned, in rank order.

    A `hvd_saef.DistributedOptimizer` made inside `fn` finds its thread's communicator by itself, without
    MPI or Horovod. Workers share the process's random state, so seed generators of your own.

    With `ranks` above 1, each of the `workers` has that many threads, which stand for the ranks of a node:
    optimizers made with worker="node" take them for one worker. A sequence gives each node its own number.
    Threads are numbered node by node.

    Raises the exception of the first worker that failed, after all threads have ended; only threads that
    others gave up waiting for may still run (see :class:`hvd_saef.StalledExchangeError`). Raises TypeError or
    ValueError for numbers of workers and ranks that are not whole numbers >= 1.
    """
    _whole("workers", workers)
    counts = [ranks] * workers if isinstance(ranks, int) else list(ranks)
    for count in counts:
        _whole("ranks", count)
    if len(counts) != workers:
        raise ValueError(f"ranks={ranks!r}: one number, or one for each of {workers} workers, is allowed.")
    everyone = range(sum(counts))
    hosts = [list(everyone[first:last]) for first, last in pairwise(accumulate(counts, initial=0))]
    meetings = Meetings()
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        communicator = ThreadCommunicator(meetings, everyone, rank, hosts)
        set_thread_communicator(communicator)
        try:
            results[rank] = fn(rank)
        except BaseException as failure:
            failures.append(failure)  # this stands before leave(): workers that fail because of it follow
        finally:
            set_thread_communicator(None)
            meetings.leave(rank)
            communicator.close()

    threads = [  # a daemon that hangs does not keep the process from ending
        threading.Thread(target=work, args=(rank,), name=f"worker {rank}", daemon=True) for rank in everyone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not any(isinstance(f, StalledExchangeError) for f in failures):
            thread.join(LOOK)
        thread.join(CALM / len(threads))  # threads that gave up waiting end together; a hung one does not
    if failures:  # raise the cause, not the errors of workers that were told of it
        raise next((f for f in failures if not isinstance(f, WorkerError)), failures[0])
    return [results[rank] for rank in everyone]


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: a whole number >= 1 is allowed.")
    if value < 1:
        raise ValueError(f"{name}={value!r}: a whole number >= 1 is allowed.")
