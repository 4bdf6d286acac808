"""The twins of the kernels in plain torch, for any device. The rows of a matrix `rows` are blocks. Local."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

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


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Returns True if no element of any tensor is infinite or NaN.

    The first pass sums each tensor: a finite sum has only finite terms. A sum that is not finite may have
    overflowed, so a second pass then looks at each element.
    """
    sums = [tensor.detach().sum().float() for tensor in tensors]
    if not sums or bool(torch.stack([s.to(sums[0].device) for s in sums]).isfinite().all()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def largest(dtype: torch.dtype) -> float:
    """Returns the largest finite number of the dtype."""
    return torch.finfo(dtype).max


@functools.cache
def largest_root(dtype: torch.dtype) -> float:
    """Returns the largest number whose square is finite in float32 or, for float64, in float64."""
    return float(torch.tensor(torch.finfo(_wide(dtype)).max, dtype=_wide(dtype)).sqrt())


def squares_fit(tensors: Sequence[Tensor]) -> bool:
    """Returns True if no element of any tensor is NaN, infinite, or so large that its square is infinite.

    The first pass takes each tensor's norm. A norm above the limit may come from many elements that are
    small enough, so a second pass then looks at each element.
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
