"""Background threads that compute as the thread does that submits the work. Local.

Each thread has its own setting that decides whether the CPU takes denormal numbers for 0
(torch.set_flush_denormal). The setting changes bits of results, so it must be the same in all threads of a
rank, and on all ranks. On a GPU each background thread has a stream of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from hvd_saef.transport import streams
from hvd_saef.transport.streams import Moment, Streams

P = ParamSpec("P")
T = TypeVar("T")
LEAST: float = struct.unpack("<d", (1).to_bytes(8, "little"))[0]
"""The least number above 0, made from its bits, since arithmetic might have flushed it to 0."""
ONE = 1.0
SHARE = 1 << 16
"""Elements for each of torch's threads: with so many, torch does not leave all the work to one thread."""


@dataclass(frozen=True)
class Done(Generic[T]):
    """What a function returned, whose work on a device may still be under way: done at `moment`."""

    _result: T
    moment: Moment

    def take(self) -> T:
        """Returns the result; the device does what this thread submits from now on after that work."""
        self.moment.order()
        return self._result


class Here(Executor):
    """Runs each function at once, in this thread. An exception is raised by :meth:`submit` itself."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:  # noqa: D102
        future: Future[T] = Future()
        future.set_result(fn(*args, **kwargs))
        return future

    def on(
        self, device: torch.device, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Future[Done[T]]:
        """Runs a function that works on the device's memory."""
        return self.submit(lambda: Done(fn(*args, **kwargs), streams.of(device).so_far()))


HERE = Here()


class Background(ThreadPoolExecutor):
    """One thread that does submitted work in order, with the denormal setting of the submitting thread."""

    def __init__(self, name: str) -> None:
        super().__init__(1, thread_name_prefix=name)
        self._streams = Streams()
        self._last: Future[Any] = Future()
        self._last.set_result(None)

    @property
    def idle(self) -> bool:
        """True if all submitted work is done."""
        return self._last.done()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:  # noqa: D102
        flushes = flushes_denormals()

        def work() -> T:
            torch.set_flush_denormal(flushes)
            return fn(*args, **kwargs)

        future = self._last = super().submit(work)
        return future

    def on(
        self, device: torch.device, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Future[Done[T]]:
        """Submits a function that works on the device's memory, with that as it was at the time of the call.

        The device does the function's work after all that this thread has submitted so far, and on the
        background's own stream.
        """
        work = streams.of(device)
        before = work.so_far()

        def in_own_stream() -> Done[T]:
            with self._streams.on(device):
                before.order()
                return Done(fn(*args, **kwargs), work.so_far())

        return self.submit(in_own_stream)


def flushes_denormals() -> bool:
    """Returns True if this thread takes denormal numbers for 0."""
    return LEAST * ONE == 0.0


def denormals() -> str:
    """Says whether denormal numbers are flushed to 0 in this thread and in torch's threads that serve it.

    Returns "on", "off", or "on in some threads".
    """
    tiny = torch.full((SHARE * torch.get_num_threads(),), torch.finfo(torch.float32).smallest_normal)
    kept = int(tiny.mul_(0.5).view(torch.int32).count_nonzero())
    return {0: "on", tiny.numel(): "off"}.get(kept, "on in some threads")
