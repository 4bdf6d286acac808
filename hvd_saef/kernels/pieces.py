"""Pieces of memory whose addresses are asked for once, and what counts as a piece."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor


class Pieces(tuple[Tensor, ...]):
    """Tensors whose memory stays where it is: kernels keep the table of their addresses here.

    Who holds them makes others when the memory moves. A copy begins without a table.
    """

    @cached_property
    def tables(self) -> dict[torch.dtype, array[int]]:
        """By the dtype that they were found to be of: address and elements of each in turn."""
        return {}

    def __reduce__(self) -> tuple[type[Pieces], tuple[Sequence[Tensor]]]:
        return Pieces, (list(self),)

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Pieces:
        """These tensors, which may be such pieces already."""
        return tensors if isinstance(tensors, cls) else cls(tensors)


def is_gapless(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill a stretch of memory without gaps or overlaps, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return expected == math.prod(tensor.shape)
