"""Scaled sign in plain torch: payloads of scales (or values), and of sign bits. Local."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_saef.kernels.operations import Stretches
from hvd_saef.kernels.twins.blocks import l1_norms, pack_signs, runs_of, unpack_signs


def sign_encode(
    stretches: Stretches, alpha: float = 0.0, beta: float = 0.0, weights: Sequence[float] = ()
) -> None:
    """See :meth:`Version.sign_encode`."""
    for stretch in stretches:
        assert stretch.payload is not None
        heads, bits = [], []
        for run in runs_of(stretch.memory, stretch.runs):
            if run.whole:
                heads.append(run.rows.clone().view(-1))
                run.rows.zero_()
                continue
            heads.append((l1_norms(run.rows) / run.size).to(run.rows.dtype))
            bits.append(pack_signs(run.rows).view(-1))
        pieces = [head.view(torch.uint8) for head in heads]
        torch.cat([stretch.payload[:0], *pieces, *bits], out=stretch.payload)


def sign_settle(stretches: Stretches) -> None:
    """See :meth:`Version.sign_settle`."""
    for stretch in stretches:
        assert stretch.payload is not None
        heads = _heads(stretch.payload, stretch.memory, stretch.runs)
        for run, head in zip(runs_of(stretch.memory, stretch.runs), heads, strict=True):
            if not run.whole:
                column = head.unsqueeze(1)
                run.rows.sub_(torch.where(torch.signbit(run.rows), -column, column))


def sign_decode(
    stretches: Stretches, alpha: float = 0.0, beta: float = 0.0, weights: Sequence[float] = ()
) -> None:
    """See :meth:`Version.sign_decode`."""
    for stretch in stretches:
        for payload, weight in zip(stretch.payloads, weights, strict=True):
            _add(stretch.memory, stretch.runs, payload, weight)


def _add(memory: Tensor, runs: Tensor, payload: Tensor, weight: float) -> None:
    """Adds weight·C(payload) to `memory`, in place."""
    heads = _heads(payload, memory, runs)
    start = sum(head.numel() for head in heads) * memory.dtype.itemsize
    for run, head in zip(runs_of(memory, runs), heads, strict=True):
        weighted = head * weight
        if run.whole:
            run.rows.add_(weighted.view(run.rows.shape))
            continue
        octets = _octets(run.size)
        bits = payload[start : start + run.count * octets].view(run.count, octets)
        start += bits.numel()
        column = weighted.unsqueeze(1)
        run.rows.add_(torch.where(unpack_signs(bits, run.size), -column, column))


def _heads(payload: Tensor, memory: Tensor, runs: Tensor) -> list[Tensor]:
    """Returns of each run the numbers in the payload's first part; raises ValueError for another length."""
    sizes, bits = [], 0
    for _, size, count, kept in runs.tolist():
        sizes.append(count * (size if kept == size else 1))
        bits += 0 if kept == size else count * _octets(size)
    numbers = sum(sizes) * memory.dtype.itemsize
    if payload.numel() != numbers + bits:
        raise ValueError(f"a sign payload of {payload.numel()} bytes: {numbers + bits} were expected.")
    return list(torch.split(payload[:numbers].clone().view(memory.dtype), sizes))  # the clone is aligned


def _octets(bits: int) -> int:
    return -(-bits // 8)
