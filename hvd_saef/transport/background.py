"""Threads in the background that compute as the thread does whose work they take over. Local.

Whether a CPU takes denormal numbers for 0 (torch.set_flush_denormal) is a setting of each thread. It decides
on bits, so all threads of a rank must have the same, and so must all ranks.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
LEAST: float = struct.unpack("<d", (1).to_bytes(8, "little"))[0]
"""The least number above 0, by its bits: no arithmetic has flushed it."""
ONE = 1.0
SHARE = 1 << 16
"""Elements for each thread of torch's: more than it leaves to one thread."""


class Background(ThreadPoolExecutor):
    """One thread, which does what it is given in order, with the submitting thread's arithmetic."""

    def __init__(self, name: str) -> None:
        super().__init__(1, thread_name_prefix=name)
        self._last: Future[Any] = Future()
        self._last.set_result(None)

    @property
    def idle(self) -> bool:
        """Whether it has done all that it was given."""
        return self._last.done()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:  # noqa: D102
        flushes = flushes_denormals()

        def work() -> T:
            torch.set_flush_denormal(flushes)
            return fn(*args, **kwargs)

        future = self._last = super().submit(work)
        return future


def flushes_denormals() -> bool:
    """Whether this thread takes denormal numbers for 0."""
    return LEAST * ONE == 0.0


def denormals() -> str:
    """Whether this thread, and those of torch's that compute for it, flush them: "on", "off", or both."""
    tiny = torch.full((SHARE * torch.get_num_threads(),), torch.finfo(torch.float32).smallest_normal)
    kept = int(tiny.mul_(0.5).view(torch.int32).count_nonzero())
    return {0: "on", tiny.numel(): "off"}.get(kept, "on in some threads")
