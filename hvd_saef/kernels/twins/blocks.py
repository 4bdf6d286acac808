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


LANES = 16  # the numbers in a line of the summation tree, see :func:`l1_norms`


def l1_norms(rows: Tensor) -> Tensor:
    """Returns each row's sum of absolute values, shape [rows], float64, added along one fixed tree.

    A row is cut into lines of 16 numbers (the last one filled up with zeros), neighbouring lines are
    added until one is left, and its halves are added until one number is left. The tree depends on
    the row's length alone, so every machine, thread count and implementation gives the same bits.
    """
    lines = -(-rows.shape[1] // LANES)
    sums = rows.new_zeros((rows.shape[0], lines * LANES), dtype=torch.float64)
    torch.abs(rows.to(torch.float64), out=sums[:, : rows.shape[1]])
    sums = sums.view(-1, lines, LANES)
    while sums.shape[1] > 1:
        paired = sums[:, 1::2]
        halved = sums[:, 0::2].clone()
        halved[:, : paired.shape[1]] += paired
        sums = halved
    sums = sums[:, 0]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def pack_signs(rows: Tensor) -> Tensor:
    """Returns the sign bits of the numbers, shape [rows, ceil(columns / 8)], uint8.

    The least significant bit comes first, and every row begins with a new byte. The bit of 0.0 is 0 and that
    of -0.0 is 1; unused bits are 0.
    """
    width = -(-rows.shape[1] // 8)
    signs = rows.new_zeros((rows.shape[0], width * 8), dtype=torch.uint8)
    signs[:, : rows.shape[1]] = torch.signbit(rows)
    places = 1 << torch.arange(8, dtype=torch.uint8, device=rows.device)
    return (signs.view(-1, width, 8) * places).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, columns: int) -> Tensor:
    """Inverts :func:`pack_signs`: returns [rows, columns], bool, True where the sign bit is 1 (minus)."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    unpacked = (packed.unsqueeze(-1) >> bits) & 1
    return unpacked.view(packed.shape[0], -1)[:, :columns].bool()


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
