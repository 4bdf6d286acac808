"""The kernels in plain torch, for any device. Each works on a matrix whose rows are blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

LANES = 16  # width of the fixed summation tree's last level


def l1_norms(rows: Tensor) -> Tensor:
    """Sums of absolute values, shape [rows], float64, over one fixed tree.

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
    """The float's sign bits, least significant bit first, every row from a fresh byte.

    Shape [rows, ceil(columns / 8)], uint8. 0.0 gives 0 and -0.0 gives 1; unused bits are 0.
    """
    width = -(-rows.shape[1] // 8)
    signs = rows.new_zeros((rows.shape[0], width * 8), dtype=torch.uint8)
    signs[:, : rows.shape[1]] = torch.signbit(rows)
    places = 1 << torch.arange(8, dtype=torch.uint8, device=rows.device)
    return (signs.view(-1, width, 8) * places).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_signs`: shape [rows, columns], bool, True where the sign is minus."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    unpacked = (packed.unsqueeze(-1) >> bits) & 1
    return unpacked.view(packed.shape[0], -1)[:, :columns].bool()


def top_k(rows: Tensor, k: int) -> Tensor:
    """Columns of each row's k largest magnitudes, ascending; ties go to the lower column.

    Shape [rows, k], int64. Exact: no sampled threshold. A NaN counts as the largest magnitude.
    """
    magnitudes = rows.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    least = torch.topk(magnitudes, k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above = magnitudes > least
    level = magnitudes == least
    free = k - above.sum(dim=1, keepdim=True)
    kept = above | (level & (level.cumsum(dim=1) <= free))
    return kept.nonzero()[:, 1].view(rows.shape[0], k)


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element of any tensor is infinite or NaN.

    One pass: a sum is finite if all terms are; a sum that is not may have overflowed, so look again.
    """
    sums = [tensor.detach().sum().float() for tensor in tensors]
    if not sums or bool(torch.stack([s.to(sums[0].device) for s in sums]).isfinite().all()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def largest(dtype: torch.dtype) -> float:
    """The largest finite number."""
    return torch.finfo(dtype).max


@functools.cache
def largest_root(dtype: torch.dtype) -> float:
    """The largest number whose square, as float32 or float64 for that, is finite."""
    return float(torch.tensor(torch.finfo(_wide(dtype)).max, dtype=_wide(dtype)).sqrt())


def squares_fit(tensors: Sequence[Tensor]) -> bool:
    """Whether no element of any tensor is NaN, infinite, or so large that its square is.

    One pass: a norm that is too large may be of many elements, so look again.
    """
    with torch.no_grad():
        norms = [torch.linalg.vector_norm(tensor, dtype=_wide(tensor.dtype)).double() for tensor in tensors]
        most = min((largest_root(tensor.dtype) for tensor in tensors), default=0.0)
        if not norms or bool((torch.stack([norm.to(norms[0].device) for norm in norms]) <= most).all()):
            return True
        return all(
            bool((tensor.to(_wide(tensor.dtype)).abs() <= largest_root(tensor.dtype)).all())
            for tensor in tensors
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
