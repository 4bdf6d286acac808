"""Sums of magnitudes along one fixed tree, for all blocks of a stretch at once. Local.

A block is cut into lines of 16 numbers (the last one filled up with zeros), neighbouring lines are added
until one is left, and its halves are added until one number is left. The tree depends on the block's length
alone, so every machine, thread count and version of the kernels gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Counts = NDArray[np.int64]
LANES = 16
"""The numbers in a line."""
MOST_LEVELS = 6
ROOM = 1.25
"""Several levels of the trees are one stage if its lines are at most so many times those of the blocks."""


@dataclass(frozen=True)
class Stage:
    """Some levels of all trees: each block's lines are gathered into groups of 2**levels, which are added."""

    lines: Tensor
    """int64: which line each place of the groups takes. The last line, a line of zeros, fills the groups up;
    the last group has nothing else."""
    levels: int


def stages(lines: Sequence[int], device: torch.device) -> tuple[Stage, ...]:
    """Returns the stages for blocks of so many `lines` each, end to end, with a line of zeros after them."""
    counts = np.array(lines, dtype=np.int64)
    return tuple(_stages(counts, device))


def _stages(counts: Counts, device: torch.device) -> Iterator[Stage]:
    room = ROOM * counts.sum()
    while counts.size and counts.max() > 1:
        total = int(counts.sum())
        levels = next((n for n in range(MOST_LEVELS, 1, -1) if _padded(counts, n).sum() <= room), 1)
        padded = _padded(counts, levels)
        first, place = np.cumsum(counts) - counts, np.cumsum(padded) - padded
        within = np.arange(int(padded.sum())) - np.repeat(place, padded)
        index = np.where(within < np.repeat(counts, padded), within + np.repeat(first, padded), total)
        index = np.concatenate([index, np.full(1 << levels, total)])
        yield Stage(torch.from_numpy(index).to(device), levels)
        counts = padded >> levels


def _padded(counts: Counts, levels: int) -> Counts:
    """Returns the counts, rounded up to multiples of 2**levels."""
    return -(-counts >> levels) << levels


def sums(lines: Tensor, through: Sequence[Stage]) -> Tensor:
    """Returns the sums of all blocks, [blocks], float64. `lines` are [n, 16], the last of them zeros."""
    for stage in through:
        lines = lines.index_select(0, stage.lines).view(-1, *(stage.levels * [2]), LANES)
        for _ in range(stage.levels):
            lines = lines.sum(dim=-2)  # of two numbers, so it is rounded once
    halves = lines.view(-1, 2, 2, 2, 2)
    for _ in range(4):
        halves = halves.sum(dim=1)
    return halves[:-1]
