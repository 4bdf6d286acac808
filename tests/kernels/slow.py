"""What sign does with the rows of a matrix, each a block, in the simplest way; and the library's own sums."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_saef.kernels.twins import trees

LANES = 16


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


def twin_sums(rows: Tensor) -> Tensor:
    """Returns what the twins add up of each row, shape [rows], float64."""
    lines = -(-rows.shape[1] // LANES)
    padded = rows.new_zeros((rows.shape[0], lines * LANES), dtype=torch.float64)
    padded[:, : rows.shape[1]] = rows.double().abs()
    with_zeros = torch.cat([padded.view(-1, LANES), padded.new_zeros(1, LANES)])
    return trees.sums(with_zeros, trees.stages(rows.shape[0] * [lines], rows.device))
