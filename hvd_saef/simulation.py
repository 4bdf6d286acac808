"""K workers as threads of one process, through the same code except for the communicator."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from hvd_saef.communicator import Channel, set_thread_communicator
from hvd_saef.errors import StalledExchangeError
from hvd_saef.threads import Meeting, ThreadCommunicator
from hvd_saef.watch import CALM, LOOK

T = TypeVar("T")


def run_workers(workers: int, fn: Callable[[int], T]) -> list[T]:
    """Call `fn(rank)` in `workers` threads and return what they returned, in rank order.

    A `hvd_saef.DistributedOptimizer` made inside `fn` finds its thread's communicator by itself: no
    MPI and no Horovod needed. Workers share the process's random state, so seed generators of your own.

    Raises what the first worker to fail raised, after all have ended (but for those that others gave up
    waiting for: see :class:`hvd_saef.StalledExchangeError`); TypeError or ValueError for a number of workers
    that is not a whole number >= 1.
    """
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise TypeError(f"workers={workers!r}: a whole number >= 1 is allowed.")
    if workers < 1:
        raise ValueError(f"workers={workers!r}: a whole number >= 1 is allowed.")
    meetings = {channel: Meeting(workers) for channel in Channel}
    results: dict[int, T] = {}
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        communicator = ThreadCommunicator(meetings, rank)
        set_thread_communicator(communicator)
        try:
            results[rank] = fn(rank)
        except BaseException as failure:
            failures.append(failure)  # before leave(): those who fail because of it come later
        finally:
            set_thread_communicator(None)
            for meeting in meetings.values():
                meeting.leave(rank)
            communicator.close()

    threads = [  # daemons: one that hangs does not keep the process from ending
        threading.Thread(target=work, args=(rank,), name=f"worker {rank}", daemon=True)
        for rank in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not any(isinstance(f, StalledExchangeError) for f in failures):
            thread.join(LOOK)
        thread.join(CALM / workers)  # those who gave up waiting end together; who hangs does not end
    if failures:
        raise failures[0]
    return [results[rank] for rank in range(workers)]
