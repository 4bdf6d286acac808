"""Buffers that are kept from step to step, since the system maps new memory page by page. Local."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 64
"""The alignment of a piece, in bytes: it suits every dtype and is the length of a cache line."""


def memory_of(device: torch.device, size: int) -> Tensor:
    """Returns `size` bytes of the device's memory, [size] uint8, uninitialized."""
    return torch.empty(size, dtype=torch.uint8, device=device)


class Buffers:
    """Holds buffers that are used again and again: each grows to the largest size asked for, and is kept."""

    def __init__(self, new: Callable[[torch.device, int], Tensor] = memory_of) -> None:
        """Use `new(device, size)` to get a buffer that pieces for the device are to lie in."""
        self._new = new
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}

    def pieces(self, name: str, sizes: Sequence[int], device: torch.device) -> list[Tensor]:
        """Returns one uint8 tensor of each of the `sizes` (bytes), aligned and uninitialized.

        All lie in the buffer `name`, and are valid until the next call with that name and device.
        """
        starts = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        buffer = self._buffers.get((name, device))
        if buffer is None or buffer.numel() < starts[-1]:
            buffer = self._buffers[name, device] = self._new(device, starts[-1])
        return [buffer[start : start + size] for start, size in zip(starts, sizes, strict=False)]
