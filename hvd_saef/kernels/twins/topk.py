"""Top-K in plain torch: payloads of the pages' counts, of values, and of offsets. Local."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_saef.kernels.operations import Stretches
from hvd_saef.kernels.topk_format import COUNT, OFFSET, PAGE, pages_of, sections_of
from hvd_saef.kernels.twins.blocks import runs_of, top_k


def topk_encode(
    stretches: Stretches,
    value_dtype: torch.dtype,
    alpha: float = 0.0,
    beta: float = 0.0,
    weights: Sequence[float] = (),
) -> None:
    """See :meth:`Version.topk_encode`."""
    for stretch in stretches:
        assert stretch.payload is not None
        _encode(stretch.memory, stretch.runs, stretch.payload, value_dtype)


def topk_decode(
    stretches: Stretches,
    value_dtype: torch.dtype,
    alpha: float = 0.0,
    beta: float = 0.0,
    weights: Sequence[float] = (),
) -> None:
    """See :meth:`Version.topk_decode`."""
    for stretch in stretches:
        for payload, weight in zip(stretch.payloads, weights, strict=True):
            _add(stretch.memory, stretch.runs, payload, value_dtype, weight)


def _encode(memory: Tensor, runs: Tensor, payload: Tensor, value_dtype: torch.dtype) -> None:
    """Writes C(memory) into `payload` and leaves the rest in `memory`, in place."""
    counts, values, offsets = [], [], []
    for run in runs_of(memory, runs):
        rows, pages = run.rows, pages_of(run.size)
        if run.whole:
            sent, rest = _rounded(rows, value_dtype)
            rows.copy_(rest)
        else:
            columns = top_k(rows, run.kept)
            sent, rest = _rounded(rows.gather(1, columns), value_dtype)
            rows.scatter_(1, columns, rest)
            offsets.append((columns % PAGE).to(OFFSET))
            if pages > 1:
                page = columns // PAGE + pages * torch.arange(run.count, device=rows.device).unsqueeze(1)
                counts.append(torch.bincount(page.view(-1), minlength=run.count * pages).to(COUNT))
        values.append(sent)
    pieces = [piece.view(-1).view(torch.uint8) for piece in (*counts, *values, *offsets)]
    payload.copy_(torch.cat([payload[:0], *pieces]))


def _add(memory: Tensor, runs: Tensor, payload: Tensor, value_dtype: torch.dtype, weight: float) -> None:
    """Adds weight·C(payload) to `memory`, in place."""
    sections = sections_of(runs, value_dtype)
    if payload.numel() != sum(sections):
        raise ValueError(f"a Top-K payload of {payload.numel()} bytes: {sum(sections)} were expected.")
    first, second = sections[0], sections[0] + sections[1]
    counts = payload[:first].clone().view(COUNT)  # the clones are aligned
    values = payload[first:second].clone().view(value_dtype).to(memory.dtype) * weight
    offsets = payload[second:].clone().view(OFFSET).to(torch.int64)
    for run in runs_of(memory, runs):
        pages, number = pages_of(run.size), run.count * run.kept
        sent, values = values[:number].view(run.count, run.kept), values[number:]
        if run.whole:
            run.rows.add_(sent)
            continue
        columns, offsets = offsets[:number].view_as(sent), offsets[number:]
        if pages > 1:
            per_page, counts = counts[: run.count * pages], counts[run.count * pages :]
            columns = columns + PAGE * _page_of_each(per_page.view(run.count, pages), run.kept)
        if bool((columns[:, -1:] >= run.size).any() | (columns.diff(dim=1) <= 0).any()):
            raise ValueError(f"a Top-K payload with offsets out of order in blocks of {run.size} elements.")
        run.rows.scatter_add_(1, columns, sent)


def _rounded(values: Tensor, value_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns `values` in the dtype in which they travel, and the rest, which stays in the error."""
    if value_dtype == values.dtype:
        return values.clone(), torch.zeros_like(values)
    most = torch.finfo(value_dtype).max
    sent = values.clamp(-most, most).to(value_dtype)
    return sent, values - sent.to(values.dtype)


def _page_of_each(counts: Tensor, kept: int) -> Tensor:
    """Returns the page of each kept element, [blocks, kept], from `counts` of each page, [blocks, pages]."""
    if bool((counts < 0).any() | (counts.sum(dim=1) != kept).any()):
        raise ValueError(f"a Top-K payload whose pages' counts do not add up to the {kept} kept in a block.")
    pages = torch.arange(counts.shape[1], device=counts.device).repeat(counts.shape[0])
    return pages.repeat_interleave(counts.reshape(-1)).view(-1, kept)
