"""The format of a Top-K payload: the pages' counts, the values, the offsets within pages. Local."""

from __future__ import annotations

import torch
from torch import Tensor

PAGE = 1 << 16  # the number of elements that a uint16 offset can tell apart
COUNT, OFFSET = torch.int32, torch.uint16


def pages_of(size: int) -> int:
    """Returns the number of pages of a block of `size` elements."""
    return -(-size // PAGE)


def sections_of(runs: Tensor, value_dtype: torch.dtype) -> list[int]:
    """Returns the bytes of the payload's three parts: the pages' counts, the values, the offsets."""
    sections = [0, 0, 0]
    for _, size, count, kept in runs.tolist():
        pages = pages_of(size)
        sections[1] += count * kept * value_dtype.itemsize
        if kept < size:
            sections[0] += count * pages * COUNT.itemsize if pages > 1 else 0
            sections[2] += count * kept * OFFSET.itemsize
    return sections
