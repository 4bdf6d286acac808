"""What the tables must know of tensors: it is hashed instead of them, so it must be quick to find. Local."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_saef.kernels.pieces import Pieces, named


class Seen(NamedTuple):
    """What the tables must know of a tensor."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Seen:
        """Looks at a tensor."""
        return cls(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def flat(self, name: str, dtypes: Sequence[torch.dtype], length: int, device: torch.device) -> Seen:
        """Returns itself; raises ValueError, with the tensor's `name`, if it does not fit."""
        if self.device != device or (not self.address and self.shape != (0,)):
            raise ValueError(f"{name}: a tensor on {device} is needed")
        if self.dtype not in dtypes:
            raise ValueError(f"{name} is {named(self.dtype)}; {' or '.join(map(named, dtypes))} is needed")
        if len(self.shape) != 1 or (self.stride != (1,) and self.shape[0] > 1):
            raise ValueError(f"{name}: a contiguous tensor of one dimension is needed")
        if self.shape[0] != length:
            raise ValueError(f"{name} has {self.shape[0]} elements; {length} are needed")
        return self


class SeenPoints(tuple[Seen, ...]):
    """What the tables must know of the points. It looks at them once, and its hash is computed once."""

    @classmethod
    def of(cls, points: Sequence[Tensor]) -> SeenPoints:
        """Looks at the points, or takes what was seen before if they are pieces, which do not move."""
        looks = points.looks if isinstance(points, Pieces) else {}
        seen: SeenPoints | None = looks.get(cls)
        if seen is None:
            seen = looks[cls] = cls(map(Seen.of, points))
        return seen

    @functools.cached_property
    def _hash(self) -> int:
        return tuple.__hash__(self)

    def __hash__(self) -> int:
        return self._hash
