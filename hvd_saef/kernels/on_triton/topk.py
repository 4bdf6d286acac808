"""Top-K by Triton: how its kernels are launched. Local."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from hvd_saef.kernels.on_triton.device import topk as encoding
from hvd_saef.kernels.on_triton.device import topk_added as adding
from hvd_saef.kernels.on_triton.tables import (
    KINDS,
    NUMBERS,
    Given,
    Sections,
    Tables,
    addresses_of,
    filled,
    form_of,
    launch,
    numbers_of,
    tables_of,
)
from hvd_saef.kernels.operations import Stretches
from hvd_saef.kernels.pieces import named
from hvd_saef.kernels.topk_format import PAGE, pages_of

TILE = 4096
"""How many elements a program encodes: those of a block, or a part of a larger one. A power of two, up to a
page. A larger block takes 16 KiB (24 for float64) while it is encoded."""
CHUNK = 1024
"""How many programs' counts are added at once; a power of two, and at least a page's."""
AT_ONCE = ("cpu",)
"""The device types that need not be waited for to know whether a payload was refused."""
ADDED = 1024
"""How many values a program adds at once; a power of two."""
LARGEST, MOST_PASSES = 1 << 31, 6
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@functools.cache
def _format_of(runs: tuple[tuple[int, int, int, int], ...], number: int) -> tuple[tuple[Sections, ...], int]:
    counts, values, offsets = 0, 0, 0
    before = []
    for _, size, count, kept in runs:
        if kept <= 0:
            raise ValueError(f"runs: kept={kept}: some element of each block is needed")
        if size >= LARGEST:
            raise ValueError(f"a block of {size} elements: fewer than {LARGEST} are allowed; set block_size")
        before.append((counts, values, offsets))
        values += count * kept
        offsets += count * kept if kept < size else 0
        counts += count * pages_of(size) if kept < size and size > PAGE else 0
    head, tail = 4 * counts, 4 * counts + values * number
    sections = [
        Sections(head + first * number, tail + 2 * second, mark, pages_of(size))
        for (mark, first, second), (_, size, _, _) in zip(before, runs, strict=True)
    ]
    return tuple(sections), tail + 2 * offsets


def format_of(runs: Sequence[Sequence[int]], number: int) -> tuple[Sequence[Sections], int]:
    """Returns where each run's values, offsets and page counts lie, and the payload's bytes."""
    return _format_of(tuple(map(tuple, runs)), number)


def topk_encode(
    stretches: Stretches,
    value_dtype: torch.dtype,
    alpha: float = 0.0,
    beta: float = 0.0,
    weights: Sequence[float] = (),
) -> None:
    """See :meth:`Version.topk_encode`. Either x or payloads may be given."""
    stretches = filled(stretches)
    if not stretches:
        return
    first = stretches[0]
    device, dtype = first.memory.device, first.memory.dtype
    updates = first.other is not None
    for stretch in stretches:
        if (stretch.other is not None) != bool(stretch.points):
            raise ValueError("x and points: both are needed, or neither")
    if updates and weights:
        raise ValueError("x and payloads: one of them is needed, not both")
    names, number = ("delta", "x"), _number(dtype, value_dtype)
    columns = 1 + len(weights)
    tables = tables_of(form_of(stretches, names, format_of, number, TILE, columns))
    given = addresses_of(stretches, "payload", tables.payload_bytes, number)
    if weights:
        _add(stretches, value_dtype, 0.0, 0.0, weights, names)
    tile = min(TILE, max(16, 1 << (tables.largest - 1).bit_length()))
    passes, room = (6, 6144) if dtype is torch.float64 else (4, 768)  # as in device/digits.py
    blocks = tables.blocks.shape[0]
    digits = torch.zeros(blocks * room, dtype=torch.int32, device=device)
    constants = {"T": DTYPES[dtype], "VALUE": KINDS.get(value_dtype, 0) if value_dtype != dtype else 0}
    constants |= {"ALIGNED": given.aligned and tables.aligned}
    launch(
        encoding.encode,
        tables.run_of.numel(),
        tables.runs,
        tables.run_of,
        given.addresses,
        numbers_of((alpha, beta), dtype, device),
        digits,
        UPDATES=updates,
        ALPHA=updates and alpha != 0,
        BETA=updates and beta != 0 and first.s is not None,
        NARROW=tables.narrow,
        TILE=tile,
        warps=max(1, tile // (64 * dtype.itemsize)),
        **constants,
    )
    if blocks:
        _encode_larger(tables, given, digits, passes, constants)


def _encode_larger(
    tables: Tables, given: Given, digits: Tensor, passes: int, constants: dict[str, Any]
) -> None:
    """Encodes the blocks that have several programs, whose first digits are counted in `digits`."""
    device, programs, blocks = digits.device, tables.run_of.numel(), tables.blocks.shape[0]
    where = tables.runs, tables.run_of
    known = torch.empty(blocks * MOST_PASSES * 2, dtype=torch.int64, device=device)
    partials = torch.empty(2 * tables.partials, dtype=torch.int32, device=device)
    common = {"T": constants["T"], "TILE": TILE, "warps": max(1, TILE // 512)}
    for nth in range(1, passes):
        launch(encoding.count_digits, programs, *where, digits, known, PASS=nth, **common)
    launch(encoding.count_kept, programs, *where, digits, known, partials, PASS=passes, **common)
    launch(
        encoding.place_kept,
        blocks,
        tables.blocks,
        given.addresses,
        known,
        partials,
        PASS=passes,
        TILE=TILE,
        CHUNK=max(CHUNK, PAGE // TILE),
        warps=4,
    )
    launch(
        encoding.write,
        programs,
        *where,
        given.addresses,
        known,
        partials,
        PASS=passes,
        VALUE=constants["VALUE"],
        ALIGNED=constants["ALIGNED"],
        **common,
    )


def topk_decode(
    stretches: Stretches,
    value_dtype: torch.dtype,
    alpha: float = 0.0,
    beta: float = 0.0,
    weights: Sequence[float] = (),
) -> None:
    """See :meth:`Version.topk_decode`."""
    stretches = filled(stretches)
    if not stretches:
        return
    if stretches[0].points and alpha != 0 and stretches[0].other is None:
        raise ValueError(f"alpha={alpha:g}: e is needed")
    _add(stretches, value_dtype, alpha, beta, weights, ("out", "e"))


def _add(
    stretches: Stretches,
    value_dtype: torch.dtype,
    alpha: float,
    beta: float,
    weights: Sequence[float],
    names: tuple[str, str],
) -> None:
    """Adds the payloads to the memory; then writes b into the points of decoding."""
    first = stretches[0]
    device, dtype = first.memory.device, first.memory.dtype
    number, columns = _number(dtype, value_dtype), 1 + len(weights)
    tables = tables_of(form_of(stretches, names, format_of, number, PAGE, columns))
    given = addresses_of(stretches, "payload", tables.payload_bytes, number)
    if given.columns != columns:
        raise ValueError(f"weights={weights!r}: one for each of the payloads is needed")
    starts = torch.empty(2 * tables.partials * len(weights), dtype=torch.int64, device=device)
    refused = refusals(device)
    launch(
        adding.index_pages,
        (tables.blocks.shape[0], len(weights)),
        tables.blocks,
        given.addresses,
        columns,
        starts,
        tables.partials,
        refused,
        CHUNK=256,
        warps=4,
    )
    shows = bool(first.points) and names[0] == "out"
    launch(
        adding.add,
        tables.run_of.numel(),
        tables.runs,
        tables.run_of,
        given.addresses,
        columns,
        numbers_of((alpha, beta, *weights), dtype, device),
        starts,
        tables.partials,
        refused,
        T=DTYPES[dtype],
        VALUE=KINDS.get(value_dtype, 0) if value_dtype != dtype else 0,
        SHOWS=shows,
        ALPHA=shows and alpha != 0,
        BETA=shows and beta != 0 and first.s is not None,
        NARROW=tables.narrow,
        ALIGNED=given.aligned and tables.aligned,
        TILE=min(ADDED, max(16, 1 << (max(1, tables.largest) - 1).bit_length())),
        warps=4,
    )
    if device.type in AT_ONCE:
        raise_refusals()


def _number(dtype: torch.dtype, value_dtype: torch.dtype) -> int:
    """Returns the bytes of a value that travels; raises ValueError for a dtype that cannot."""
    if dtype not in NUMBERS:
        raise ValueError(f"float32 or float64 is needed, not {named(dtype)}")
    if value_dtype is not dtype and value_dtype not in KINDS:
        raise ValueError(
            f"value_dtype: {named(dtype)}, float16 or bfloat16 is needed, not {named(value_dtype)}"
        )
    return value_dtype.itemsize


_pending: dict[torch.device, Tensor] = {}
"""By device, a number that is not 0 if a payload was refused there."""


def refusals(device: torch.device) -> Tensor:
    """Returns the number, int32, that kernels on the device set to 1 when they refuse a payload."""
    if device not in _pending:
        _pending[device] = torch.zeros(1, dtype=torch.int32).to(device)  # is over before other streams use it
    return _pending[device]


def raise_refusals() -> None:
    """Raises ValueError if a payload was refused since the last call. Waits for the devices."""
    found = [refused for refused in _pending.values() if bool(refused)]
    for refused in found:
        refused.zero_()
    if found:
        raise ValueError(
            "payloads: the page counts of a Top-K payload do not add up, or its offsets are not ascending, "
            "or lie beyond their block"
        )
