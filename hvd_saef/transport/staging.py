"""Memory in which MPI finds payloads: theirs, where it can; else host memory, with copies both ways. Local.

MPI reads and writes host memory. Payloads of a GPU are copied to page-locked host memory and back, on a
stream of their own, so that copies and computation overlap; a CUDA-aware MPI takes them where they are, if
HVD_SAEF_CUDA_AWARE_MPI=1 says that it is one. Payloads must be computed on the device's default stream, which
is the one that threads agree on. UNTRIED on hardware.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

cuda: Any = torch.cuda


def reaches_mpi(device: torch.device) -> bool:
    """Whether MPI reads and writes this device's memory."""
    return device.type == "cpu" or os.environ.get("HVD_SAEF_CUDA_AWARE_MPI") == "1"


def host_memory(size: int) -> Tensor:
    """So many bytes, page-locked where there is a GPU; torch keeps such memory for the next time."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def so_far(device: torch.device) -> Callable[[], None]:
    """To be called in another thread: its work on the device then waits for what this one has begun."""
    if device.type != "cuda":
        return lambda: None
    event = cuda.Event()
    event.record(cuda.current_stream(device))
    return lambda: cuda.current_stream(device).wait_event(event)


class Staging:
    """For one channel: its copies wait for each other, and for no other's."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def ready(self, device: torch.device) -> None:
        """Wait until payloads on the device are computed: MPI does not know of streams."""
        if device.type == "cuda":
            cuda.current_stream(device).synchronize()

    def leaving(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        """Copies of the pieces, end to end in one buffer that MPI reads."""
        copies = self.room(pieces)
        self._copy(pieces, copies, pieces[0].device)
        return copies

    def room(self, places: Sequence[Tensor]) -> Sequence[Tensor]:
        """Room for what will come to these places, end to end in one buffer that MPI writes."""
        sizes, device = [place.numel() for place in places], places[0].device
        if reaches_mpi(device):
            buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        else:
            buffer = host_memory(sum(sizes))
        return torch.split(buffer, sizes)

    def landed(self, pieces: Sequence[Tensor], places: Sequence[Tensor]) -> None:
        """Copy what has come to its places."""
        self._copy(pieces, places, places[0].device)

    def _copy(self, pieces: Sequence[Tensor], places: Sequence[Tensor], device: torch.device) -> None:
        with self._own_stream(device):
            for piece, place in zip(pieces, places, strict=True):
                place.copy_(piece, non_blocking=True)

    @contextmanager
    def _own_stream(self, device: torch.device) -> Iterator[None]:
        """Copies within start once the payload is computed, and are done at the end."""
        if reaches_mpi(device):
            yield
            self.ready(device)
            return
        if device not in self._streams:
            self._streams[device] = cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(cuda.current_stream(device))
        with cuda.stream(stream):
            yield
        stream.synchronize()
