"""The order of work on GPUs: streams and events, in this one place. Local.

A call that works on a GPU's memory returns before the work is done. What one thread submits is done in order,
since a thread has one current stream for each GPU; but each background thread has a stream of its own. So
where a thread needs what another one submitted, its stream waits for a :class:`Moment` of the other's, and
the host does not wait. On the CPU, work is done when the call returns, and all of this does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

cuda: Any = torch.cuda


class Moment:
    """A point in a device's work: the end of all that one thread has submitted. The CPU's are always over."""

    def order(self) -> None:
        """Makes the device do all that this thread submits from now on after the moment."""

    def wait(self) -> None:
        """Makes this thread wait until the moment is over."""


class _Event(Moment):
    """A moment of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: Any = cuda.Event(blocking=True)  # who waits for it leaves the core to others
        self._event.record(cuda.current_stream(device))

    def order(self) -> None:
        cuda.current_stream(self._device).wait_event(self._event)

    def wait(self) -> None:
        self._event.synchronize()


class Timestamp:
    """A point in time: of the host, as the CPU's work is done when a call returns."""

    at_once = True
    """True if the time is known at once, and never waited for."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    @property
    def over(self) -> bool:
        """True if :meth:`since` need not wait."""
        return True

    def since(self, start: Any) -> float:
        """Returns the seconds from `start`, an earlier one of the same device, until this one."""
        return self._time - float(start._time)


class _GpuTimestamp(Timestamp):
    """The point in time at which a GPU has done what this thread had submitted."""

    at_once = False

    def __init__(self, device: torch.device) -> None:
        self._event: Any = cuda.Event(enable_timing=True, blocking=True)
        self._event.record(cuda.current_stream(device))

    @property
    def over(self) -> bool:
        return bool(self._event.query())

    def since(self, start: Any) -> float:
        self._event.synchronize()
        return float(start._event.elapsed_time(self._event)) / 1e3


class Work:
    """The work on one device's memory and its order; this one, the CPU's, is done at once.

    It also serves devices with one stream for all threads (Apple's).
    """

    waits = True
    """True if copies to and from the host are over when they return. False if they are work in a stream."""

    def so_far(self) -> Moment:
        """Returns the end of all that this thread has submitted to the device so far."""
        return OVER

    def timestamp(self) -> Timestamp:
        """Returns the time at which all is done that this thread has submitted so far."""
        return Timestamp()

    def new_stream(self) -> Any:
        """Makes a stream; None for the CPU."""
        return None

    def within(self, stream: Any) -> AbstractContextManager[None]:
        """Returns a context in which this thread's work on the device goes to `stream`.

        The device is the thread's current one there, as libraries that allocate or communicate need it.
        """
        return nullcontext()

    def stream(self) -> Any:
        """Returns this thread's current stream; None for the CPU."""
        return None

    def join(self, streams: set[Any]) -> None:
        """Makes this thread's current stream wait for all that was submitted so far to the others."""

    def host_memory(self, size: int) -> Tensor:
        """Returns `size` bytes of host memory, [size] uint8, that the device copies to and from.

        For a GPU it is page-locked, so that copies are done while the host does something else.
        """
        return torch.empty(size, dtype=torch.uint8)

    def is_captured(self) -> bool:
        """Returns True if this thread's work on the device is being captured into a CUDA graph."""
        return False


class _GpuWork(Work):
    """The work on a GPU's memory."""

    waits = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def so_far(self) -> Moment:
        return _Event(self._device)

    def timestamp(self) -> Timestamp:
        return _GpuTimestamp(self._device)

    def new_stream(self) -> Any:
        return cuda.Stream(self._device)

    @contextmanager
    def within(self, stream: Any) -> Iterator[None]:
        with cuda.device(self._device), cuda.stream(stream):
            yield

    def stream(self) -> Any:
        return cuda.current_stream(self._device)

    def join(self, streams: set[Any]) -> None:
        own = self.stream()
        for other in streams - {own}:
            own.wait_stream(other)

    def host_memory(self, size: int) -> Tensor:
        with cuda.device(self._device):  # else memory of the first GPU might be taken as well
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def is_captured(self) -> bool:
        with cuda.device(self._device):
            return bool(cuda.is_current_stream_capturing())


OVER = Moment()
"""A moment that is over."""


@cache
def of(device: torch.device) -> Work:
    """Returns the work on memory of `device`. torch calls AMD's GPUs "cuda" too."""
    return _GpuWork(device) if device.type == "cuda" else Work()


class Sources:
    """The streams that some tensors are computed in, of any threads."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, set[Any]] = {}

    def note(self, device: torch.device) -> None:
        """Notes that a tensor on the device was computed in this thread's current stream."""
        self._streams.setdefault(device, set()).add(of(device).stream())

    def join(self, device: torch.device) -> None:
        """Makes this thread's current stream of the device wait for all others that were noted."""
        of(device).join(self._streams.get(device, set()))


class Streams:
    """The streams of one background thread: one for each device that it works on, made at the first use."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """Returns a context in which this thread's work on the device goes to its own stream."""
        work = of(device)
        if device not in self._streams:
            self._streams[device] = work.new_stream()
        return work.within(self._streams[device])
