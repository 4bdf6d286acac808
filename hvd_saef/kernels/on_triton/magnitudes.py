"""The look at numbers by Triton: one launch for all tensors of a dtype, and one wait. Local."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_saef.kernels.on_triton.device import magnitudes as device
from hvd_saef.kernels.on_triton.tables import KEPT_TABLES, launch
from hvd_saef.kernels.pieces import is_gapless

TILE, TILES = 1024, 16
"""How many numbers a program looks at at once, and how often; the first is a power of two."""


def at_most(tensors: Sequence[Tensor], limit: float) -> bool:
    """See :meth:`Version.at_most`. Waits for the device."""
    some = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not some:
        return True
    first = some[0]
    if any(tensor.dtype is not first.dtype or tensor.device != first.device for tensor in some):
        raise ValueError("tensors: of one dtype and on one device they have to be")
    some = [one if one.is_contiguous() or is_gapless(one) else one.contiguous() for one in some]
    places = tuple((tensor.data_ptr(), tensor.numel()) for tensor in some)
    table, tensor_of = _table(places, TILE * TILES, first.device)
    found = torch.zeros(1, dtype=torch.int32, device=first.device)
    bits = 8 * first.dtype.itemsize
    most = _bits(limit, first.dtype)
    programs = tensor_of.numel()
    launch(device.look, programs, table, tensor_of, found, most, BITS=bits, TILE=TILE, TILES=TILES, warps=4)
    return not bool(found)


@functools.lru_cache(KEPT_TABLES)
def _table(places: tuple[tuple[int, int], ...], most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the table of tensors for programs of `most` numbers, and the tensor of each program."""
    rows, programs, first = [], [], 0
    for address, size in places:
        rows.append([address, size, first])
        programs.append(-(-size // most))
        first += programs[-1]
    numbers = torch.arange(len(rows), dtype=torch.int32)
    tensor_of = torch.repeat_interleave(numbers, torch.tensor(programs))
    return torch.tensor(rows).to(device), tensor_of.to(device)


@functools.cache
def _bits(limit: float, dtype: torch.dtype) -> int:
    """Returns the bits of the largest number of the dtype that does not exceed `limit`, which is > 0."""
    number = torch.tensor(min(limit, torch.finfo(dtype).max), dtype=torch.float64).to(dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return int(number.view(integers[dtype.itemsize])) - (float(number) > limit)
