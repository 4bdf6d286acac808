"""Memory that stays from step to step: what is allocated anew is mapped anew, page by page. Local."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: what any dtype and a line of the cache want."""


class Buffers:
    """For one use after the other: each grows to what the largest needs, and stays."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}

    def pieces(self, name: str, sizes: Sequence[int], device: torch.device) -> list[Tensor]:
        """Pieces of so many bytes in one buffer, uninitialized and aligned, until the next use."""
        starts = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        buffer = self._buffers.get((name, device))
        if buffer is None or buffer.numel() < starts[-1]:
            buffer = self._buffers[name, device] = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        return [buffer[start : start + size] for start, size in zip(starts, sizes, strict=False)]
