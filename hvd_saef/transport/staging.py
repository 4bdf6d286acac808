"""The memory that a transport reads and writes: the payloads' own, or else copies on the host. Local.

MPI and gloo read and write host memory. Payloads on a GPU are copied to page-locked host memory and back, in
the current stream of the thread, which is the background's own: so copies and computation overlap. NCCL uses
the GPU's memory. No public call of MPI says for sure that it is CUDA-aware, so the user says it, by
HVD_SAEF_CUDA_AWARE_MPI=1: MPI then uses the GPU's memory as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvd_saef.transport import streams
from hvd_saef.transport.buffers import Buffers, memory_of


def reaches_mpi(device: torch.device) -> bool:
    """Returns True if MPI reads and writes the memory of `device` directly."""
    return device.type == "cpu" or os.environ.get("HVD_SAEF_CUDA_AWARE_MPI") == "1"


class Staging:
    """The copies of one channel, in memory that is kept. One call of a transport uses it at a time.

    A thread that uses it after another one has, on a GPU, a stream that comes after the other's.

    `reaches` says whether the transport reads and writes the memory of a device directly. It `follows` if it
    does so in the order of streams, as NCCL does; else the host waits until a payload is computed.
    """

    def __init__(self, reaches: Callable[[torch.device], bool], follows: bool = False) -> None:
        self._reaches = reaches
        self._follows = follows
        self._buffers = Buffers(self._new)

    def direct(self, device: torch.device) -> bool:
        """Returns True if the transport reads and writes the memory of `device` without copies."""
        return self._reaches(device)

    def ready(self, device: torch.device) -> None:
        """Waits until payloads on the device are computed, unless the transport does so itself."""
        if not (self._follows and self.direct(device)):
            streams.of(device).so_far().wait()

    def leaving(self, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns copies of the pieces (1-D uint8), end to end in one buffer, which the transport may read.

        They are valid until the next call.
        """
        copies = self._memory("leaving", pieces)
        self._copy(pieces, copies, pieces[0].device)
        self.ready(pieces[0].device)
        return copies

    def room(self, places: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns uninitialized memory for each place, of its size, end to end in one buffer.

        It is valid until the next call.
        """
        return self._memory("landed", places)

    def landed(self, pieces: Sequence[Tensor], places: Sequence[Tensor]) -> None:
        """Copies the received `pieces`, which lie in memory of this object, into `places`, in place."""
        # The copy is over before the memory is received into again: that comes after the next `leaving`.
        self._copy(pieces, places, places[0].device)

    def _memory(self, name: str, pieces: Sequence[Tensor]) -> Sequence[Tensor]:
        sizes = [piece.numel() for piece in pieces]
        (buffer,) = self._buffers.pieces(name, [sum(sizes)], pieces[0].device)
        return torch.split(buffer, sizes)

    def _new(self, device: torch.device, size: int) -> Tensor:
        return memory_of(device, size) if self.direct(device) else streams.of(device).host_memory(size)

    @staticmethod
    def _copy(pieces: Sequence[Tensor], places: Sequence[Tensor], device: torch.device) -> None:
        for piece, place in zip(pieces, places, strict=True):
            place.copy_(piece, non_blocking=not streams.of(device).waits)
