"""Scaled sign by Triton: how its kernels are launched. Local."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl

from hvd_saef.kernels.on_triton.device import sign as device
from hvd_saef.kernels.on_triton.tables import (
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

TILE, TILES = 1024, 8
"""The most elements that a program works on at once, and how often; both are powers of two."""
CHUNK = 64
"""How many programs' sums are added at once."""
NUMBERS = {torch.float32: tl.float32, torch.float64: tl.float64}


def format_of(runs: Sequence[Sequence[int]], number: int) -> tuple[list[Sections], int]:
    """Returns where each run's scales (or values) and its bits lie, and the payload's bytes."""
    heads, tails, end = [], [], 0
    for _, size, count, kept in runs:
        heads.append(end)
        end += count * (size if kept == size else 1) * number
    for _, size, count, kept in runs:
        tails.append(end)
        end += 0 if kept == size else count * (-(-size // 8))
    return [Sections(head, tail, head, number) for head, tail in zip(heads, tails, strict=True)], end


def sign_encode(
    stretches: Stretches, alpha: float = 0.0, beta: float = 0.0, weights: Sequence[float] = ()
) -> None:
    """See :meth:`Version.sign_encode`."""
    stretches = filled(stretches)
    for stretch in stretches:
        if (stretch.other is not None) != bool(stretch.points):
            raise ValueError("x and points: both are needed, or neither")
    if not stretches:
        return
    tables, given, common = _prepare(stretches, ("delta", "x"), "payload", weights)
    updates = stretches[0].other is not None
    beta = beta if stretches[0].s is not None else 0.0
    memory = stretches[0].memory
    partials = torch.empty(16 * tables.partials, dtype=torch.float64, device=memory.device)
    launch(
        device.encode,
        tables.run_of.numel(),
        tables.runs,
        tables.run_of,
        given.addresses,
        given.columns,
        numbers_of((alpha, beta, *weights), memory.dtype, memory.device),
        partials,
        UPDATES=updates,
        ALPHA=updates and alpha != 0,
        BETA=updates and beta != 0,
        NARROW=tables.narrow,
        **common,
    )
    launch(
        device.reduce,
        tables.blocks.shape[0],
        tables.blocks,
        given.addresses,
        partials,
        T=common["T"],
        ALIGNED=common["ALIGNED"],
        CHUNK=CHUNK,
        warps=4,
    )


def sign_settle(stretches: Stretches) -> None:
    """See :meth:`Version.sign_settle`."""
    stretches = filled(stretches)
    if not stretches:
        return
    tables, given, common = _prepare(stretches, ("memory", "other"), "payload", ())
    programs = tables.run_of.numel()
    launch(device.settle, programs, tables.runs, tables.run_of, given.addresses, **common)


def sign_decode(
    stretches: Stretches, alpha: float = 0.0, beta: float = 0.0, weights: Sequence[float] = ()
) -> None:
    """See :meth:`Version.sign_decode`."""
    stretches = filled(stretches)
    if not stretches:
        return
    first = stretches[0]
    settles, shows = first.payload is not None, bool(first.points)
    if settles and first.other is None:
        raise ValueError("sent: it settles e, which is not given")
    if shows and alpha != 0 and first.other is None:
        raise ValueError(f"alpha={alpha:g}: e is needed")
    tables, given, common = _prepare(stretches, ("out", "e"), "sent", weights)
    beta = beta if first.s is not None else 0.0
    launch(
        device.decode,
        tables.run_of.numel(),
        tables.runs,
        tables.run_of,
        given.addresses,
        given.columns,
        numbers_of((alpha, beta, *weights), first.memory.dtype, first.memory.device),
        SETTLES=settles,
        SHOWS=shows,
        ALPHA=alpha != 0,
        BETA=beta != 0,
        NARROW=tables.narrow,
        **common,
    )


def _prepare(
    stretches: Stretches, names: tuple[str, str], payload: str, weights: Sequence[float]
) -> tuple[Tables, Given, dict[str, Any]]:
    """Returns the tables, the payloads' addresses, and the constants that all kernels here take."""
    for weight in weights:
        if not math.isfinite(weight):
            raise ValueError(f"weight={weight}: a finite number is needed")
    memory = stretches[0].memory
    number = memory.dtype.itemsize
    columns = 1 + len(weights)
    tables = tables_of(form_of(stretches, names, format_of, number, TILE * TILES, columns))
    given = addresses_of(stretches, payload, tables.payload_bytes, number)
    if given.columns != columns:
        raise ValueError(f"weights={weights!r}: one for each of the payloads is needed")
    tile = min(TILE, max(16, 1 << (tables.largest - 1).bit_length())) if tables.largest else TILE
    return (
        tables,
        given,
        {
            "T": NUMBERS[memory.dtype],
            "ALIGNED": given.aligned,
            "TILE": tile,
            "TILES": TILES if tile == TILE else 1,
            "warps": max(1, tile // 128),
        },
    )
