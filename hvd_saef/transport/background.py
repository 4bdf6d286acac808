"""Background threads that compute with the arithmetic of the thread that submits the work. Local.

Each thread has its own setting that decides whether the CPU takes denormal numbers for 0
(torch.set_flush_denormal). The setting changes bits of results, so it must be the same in all threads of a
rank, and on all ranks.
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
"""The least number above 0, made from its bits, since arithmetic might have flushed it to 0."""
ONE = 1.0
SHARE = 1 << 16
"""Elements for each of torch's threads: with so many, torch does not leave all the work to one thread."""


class Background(ThreadPoolExecutor):
    """One thread that does submitted work in order, with the denormal setting of the submitting thread."""

    def __init__(self, name: str) -> None:
        super().__init__(1, thread_name_prefix=name)
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
