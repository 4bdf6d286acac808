"""What the twins do with blocks of equal size, the rows of a matrix `rows`. Local."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """A row of an operation's `runs`, with a view of its memory, [count, size]: one row for each block."""

    rows: Tensor
    size: int
    count: int
    kept: int

    @property
    def whole(self) -> bool:
        """True if all elements of the blocks travel."""
        return self.kept == self.size


def runs_of(flat: Tensor, table: Tensor) -> Iterator[Run]:
    """Yields the runs of `table`, which is an operation's `runs`, with their memory in `flat`."""
    for start, size, count, kept in table.tolist():
        yield Run(flat[start : start + size * count].view(count, size), size, count, kept)


def top_k(rows: Tensor, k: int) -> Tensor:
    """Returns the columns of each row's k largest magnitudes, ascending, shape [rows, k], int64.

    Of equal magnitudes the lower column is taken. The choice is exact: no threshold is estimated from a
    sample. NaN counts as infinity, the largest magnitude.
    """
    magnitudes = rows.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    least = torch.topk(magnitudes, k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above = magnitudes > least
    level = magnitudes == least
    free = k - above.sum(dim=1, keepdim=True)
    kept = above | (level & (level.cumsum(dim=1) <= free))
    return kept.nonzero()[:, 1].view(rows.shape[0], k)
