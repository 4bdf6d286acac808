"""The memory that a transport reads and writes: the payloads' own, or else copies on the host. Local.

MPI and gloo read and write host memory. Payloads on a GPU are copied to page-locked host memory and back, on
a separate stream, so that copies and computation overlap. With HVD_SAEF_CUDA_AWARE_MPI=1 the user says that
MPI is CUDA-aware; MPI then uses the GPU's memory directly, as NCCL does. Payloads must be computed on the
device's default stream, which is the same stream in all threads. UNTRIED on hardware.
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
    """Returns True if MPI reads and writes the memory of `device` directly."""
    return device.type == "cpu" or os.environ.get("HVD_SAEF_CUDA_AWARE_MPI") == "1"


def host_memory(size: int) -> Tensor:
    """Returns `size` bytes of host memory, [size] uint8, uninitialized; page-locked if there is a GPU.

    torch keeps freed page-locked memory for reuse.
    """
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def so_far(device: torch.device) -> Callable[[], None]:
    """Returns a function for another thread to call, which orders that thread's work on the device.

    Work that the other thread submits after the call waits for all work that this thread has submitted so
    far.
    """
    if device.type != "cuda":
        return lambda: None
    event = cuda.Event()
    event.record(cuda.current_stream(device))
    return lambda: cuda.current_stream(device).wait_event(event)


class Staging:
    """The copies of one channel: they wait for each other, and not for those of other channels.

    `reaches` says whether the transport reads and writes the memory of a device directly.
    """

    def __init__(self, reaches: Callable[[torch.device], bool]) -> None:
        self._reaches = reaches
        self._streams: dict[torch.device, Any] = {}

    def direct(self, device: torch.device) -> bool:
        """Returns True if the transport reads and writes the memory of `device` without copies."""
        return self._reaches(device)

    def ready(self, device: torch.device) -> None:
        """Waits until payloads on the device are computed, for a transport that does not know of streams."""
        if device.type == "cuda":
            cuda.current_stream(device).synchronize()

    def leaving(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns copies of the pieces (1-D uint8), end to end in one buffer that the transport can read."""
        copies = self.room(pieces)
        self._copy(pieces, copies, pieces[0].device)
        return copies

    def room(self, places: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns uninitialized memory for each place, of its size, end to end in one buffer."""
        sizes, device = [place.numel() for place in places], places[0].device
        if self.direct(device):
            buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        else:
            buffer = host_memory(sum(sizes))
        return torch.split(buffer, sizes)

    def landed(self, pieces: Sequence[Tensor], places: Sequence[Tensor]) -> None:
        """Copies the received `pieces` into `places`, in place."""
        self._copy(pieces, places, places[0].device)

    def _copy(self, pieces: Sequence[Tensor], places: Sequence[Tensor], device: torch.device) -> None:
        with self._own_stream(device):
            for piece, place in zip(pieces, places, strict=True):
                place.copy_(piece, non_blocking=True)

    @contextmanager
    def _own_stream(self, device: torch.device) -> Iterator[None]:
        """Returns a context for copies: they start when the payload is computed and are done at its end."""
        if self.direct(device):
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
