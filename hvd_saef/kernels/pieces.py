"""Pieces of memory whose addresses are looked up once, memory without gaps, names of dtypes. Local."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Pieces(tuple[Tensor, ...]):
    """Tensors whose memory does not move: the kernels keep the table of their addresses here.

    If the memory moves, the owner must make new pieces. A copy begins without a table.
    """

    @cached_property
    def tables(self) -> dict[torch.dtype, array[int]]:
        """The tables, by the dtype that all pieces have: address and number of elements of each in turn."""
        return {}

    @cached_property
    def looks(self) -> dict[type, Any]:
        """What other versions know of the pieces once they have looked at them, by its type."""
        return {}

    def __reduce__(self) -> tuple[type[Pieces], tuple[Sequence[Tensor]]]:
        return Pieces, (list(self),)

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Pieces:
        """Returns `tensors` as pieces; returns them unchanged if they are pieces already."""
        return tensors if isinstance(tensors, cls) else cls(tensors)


def named(dtype: torch.dtype) -> str:
    """Returns the dtype's name as in torch's own errors: Float, Double, Half, Int and so on."""
    return torch.empty(0, dtype=dtype).type().removeprefix("torch.").removesuffix("Tensor")


def is_gapless(tensor: Tensor) -> bool:
    """Returns True if the tensor's elements fill memory without gaps or overlaps, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return expected == math.prod(tensor.shape)
