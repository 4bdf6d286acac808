"""The look at numbers, in plain torch. Local."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def largest(dtype: torch.dtype) -> float:
    """Returns the largest finite number of the dtype."""
    return torch.finfo(dtype).max


@functools.cache
def largest_root(dtype: torch.dtype) -> float:
    """Returns the largest number whose square is finite in float32 or, for float64, in float64."""
    wide = torch.promote_types(dtype, torch.float32)
    return float(torch.tensor(torch.finfo(wide).max, dtype=wide).sqrt())


@torch.no_grad()
def at_most(tensors: Sequence[Tensor], limit: float) -> bool:
    """See :meth:`Version.at_most`. The largest magnitude of a tensor is NaN if any element is."""
    some = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not some:
        return True
    most = torch.stack(torch._foreach_norm(some, torch.inf))
    return bool((most.double() <= limit).all())  # the limit may be beyond the range of the tensors' dtype
