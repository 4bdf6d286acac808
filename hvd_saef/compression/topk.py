"""Top-K: only the entries of largest magnitude of each block travel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.compression.blocks import BlockedTensor, Blocks, Memory
from hvd_saef.compression.compressor import Compressor, Considered, Fused, check_dense_below

PAGE = 1 << 16  # the number of elements that a uint16 offset can tell apart
COUNT, OFFSET = torch.int32, torch.uint16
Payload = TypeVar("Payload", Tensor, Sequence[Tensor])


@dataclass(frozen=True)
class TopKCompressor(Compressor):
    """Keeps each block's min(d, max(1, ⌈ratio·d⌉)) entries of largest magnitude, exactly.

    Ties go to the lower index. The values travel in `value_dtype`: torch.float16, torch.bfloat16 or None,
    which is x's dtype. The rounding stays in the error; a value beyond the dtype's range travels as the
    largest of that range, and the rest stays in the error too.

    The payload has three parts: for each block of more than one page (65,536 elements) the number of entries
    that each of its pages keeps, int32; the kept values of all blocks; and the offsets of these values within
    their pages, ascending, uint16. A block that is kept whole has values only.

    Raises TypeError or ValueError for a ratio that is not a number in (0, 1], or another value_dtype.
    """

    ratio: float
    value_dtype: torch.dtype | None = None
    dense_below: int = field(default=0, kw_only=True)
    """Blocks of fewer elements are kept whole."""

    def __post_init__(self) -> None:
        check_dense_below(self.dense_below)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)):
            raise TypeError(f"ratio={self.ratio!r}: a number above 0 and up to 1 is allowed (0.01 is 1 %).")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio!r}: a number above 0 and up to 1 is allowed (0.01 is 1 %).")
        if self.value_dtype not in (None, torch.float16, torch.bfloat16):
            wrong = ValueError if isinstance(self.value_dtype, torch.dtype) else TypeError
            raise wrong(
                f"value_dtype={self.value_dtype!r}: None (the values travel in x's dtype), torch.float16 "
                "and torch.bfloat16 are allowed."
            )
        object.__setattr__(self, "ratio", float(self.ratio))  # 1 and 1.0 are the same setting

    costs: ClassVar[tuple[str, ...]] = ("topk_encode", "topk_decode")

    @property
    def call(self) -> str:
        """See :attr:`Compressor.call`."""
        values = f", {self.value_dtype}" if self.value_dtype else ""
        return f"hvd_saef.Compression.topk({self.ratio:g}{values})"

    def work(self, encoded: float, decoded: float) -> dict[str, float]:
        """See :meth:`Compressor.work`. Only kept entries are decoded."""
        return {"topk_encode": encoded, "topk_decode": self.ratio * decoded}

    @classmethod
    def considered(cls) -> Sequence[Considered]:
        """See :meth:`Compressor.considered`."""
        return [Considered(f"Top-K {100 * k:g} %", f"topk-{100 * k:g}", cls(k)) for k in (0.01, 0.001)]

    def kept(self, size: int) -> int:
        """Returns how many elements of a block of `size` elements travel."""
        if size < self.dense_below:
            return size
        return min(size, max(1, math.ceil(self.ratio * size)))

    def payload_bytes(self, layout: Blocks) -> int:
        """Returns the bytes: a value and a two-byte offset for each kept entry, and the pages' counts."""
        return sum(self._sections(layout))

    @property
    def fused(self) -> Fused | None:
        """See :attr:`Compressor.fused`."""
        own = type(self) is TopKCompressor  # a subclass may encode otherwise
        return _FusedTopK(self) if own and kernels.available() else None

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """See :meth:`Compressor.encode`."""
        native = kernels.native_for(delta.flat)
        if native is None:
            self._encode(delta, payload)
        else:
            native.topk_encode(delta.flat, *self._given(delta.blocks, payload))

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """See :meth:`Compressor.decode_add`. Raises ValueError for bytes that no encoder writes."""
        native = kernels.native_for(out.flat)
        if native is None:
            self._decode_add(payload, out, weight)
        else:
            native.topk_decode(out.flat, *self._given(out.blocks, [payload]), weight)

    def _encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """Does what :meth:`encode` does, in plain torch on any device."""
        counts, values, offsets = [], [], []
        for run, rows in delta.rows():
            kept, pages = self.kept(run.size), _pages(run.size)
            if kept == run.size:
                sent, rest = self._rounded(rows)
                rows.copy_(rest)
            else:
                columns = kernels.top_k(rows, kept)
                sent, rest = self._rounded(rows.gather(1, columns))
                rows.scatter_(1, columns, rest)
                offsets.append((columns % PAGE).to(OFFSET))
                if pages > 1:
                    page = columns // PAGE + pages * torch.arange(run.count, device=rows.device).unsqueeze(1)
                    counts.append(torch.bincount(page.view(-1), minlength=run.count * pages).to(COUNT))
            values.append(sent)
        pieces = [piece.view(-1).view(torch.uint8) for piece in (*counts, *values, *offsets)]
        payload.copy_(torch.cat([payload[:0], *pieces]))

    def _decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """Does what :meth:`decode_add` does, in plain torch on any device."""
        sections = self._sections(out.blocks)
        if payload.numel() != sum(sections):
            raise ValueError(f"a Top-K payload of {payload.numel()} bytes: {sum(sections)} were expected.")
        first, second = sections[0], sections[0] + sections[1]
        counts = payload[:first].clone().view(COUNT)  # the clones are aligned
        values = payload[first:second].clone().view(self._wire(out.blocks.dtype)).to(out.flat.dtype) * weight
        offsets = payload[second:].clone().view(OFFSET).to(torch.int64)
        for run, rows in out.rows():
            kept, pages = self.kept(run.size), _pages(run.size)
            sent, values = values[: run.count * kept].view(run.count, kept), values[run.count * kept :]
            if kept == run.size:
                rows.add_(sent)
                continue
            columns, offsets = offsets[: sent.numel()].view_as(sent), offsets[sent.numel() :]
            if pages > 1:
                per_page, counts = counts[: run.count * pages], counts[run.count * pages :]
                columns = columns + PAGE * _page_of_each(per_page.view(run.count, pages), kept)
            if bool((columns[:, -1:] >= run.size).any() | (columns.diff(dim=1) <= 0).any()):
                raise ValueError(
                    f"a Top-K payload with offsets out of order in blocks of {run.size} elements."
                )
            rows.scatter_add_(1, columns, sent)

    def _given(self, blocks: Blocks, payload: Payload) -> tuple[Tensor, Payload, torch.dtype]:
        """Returns the arguments that kernels take after the memory that they work on."""
        return blocks.table(self.kept), payload, self._wire(blocks.dtype)

    def _wire(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype of the values that travel for x of `dtype`."""
        return self.value_dtype or dtype

    def _rounded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `values` in the dtype in which they travel, and the rest, which stays in the error."""
        if self.value_dtype is None:
            return values.clone(), torch.zeros_like(values)
        most = torch.finfo(self.value_dtype).max
        sent = values.clamp(-most, most).to(self.value_dtype)
        return sent, values - sent.to(values.dtype)

    def _sections(self, blocks: Blocks) -> list[int]:
        """Returns the bytes of the payload's three parts: the pages' counts, the values, the offsets."""
        sections = [0, 0, 0]
        for run in blocks.runs:
            kept, pages = self.kept(run.size), _pages(run.size)
            sections[1] += run.count * kept * self._wire(blocks.dtype).itemsize
            if kept < run.size:
                sections[0] += run.count * pages * COUNT.itemsize if pages > 1 else 0
                sections[2] += run.count * kept * OFFSET.itemsize
        return sections


@dataclass(frozen=True)
class _FusedTopK:
    """Computes the rows around C by kernels."""

    compressor: TopKCompressor

    def send(self, memory: Memory, payload: Tensor) -> None:
        """See :meth:`Fused.send`."""
        m, given = memory, self.compressor._given(memory.blocks, payload)
        if m.parameter_memory:
            kernels.native.topk_encode(m.e, *given, m.x, m.s, m.alpha, m.beta, m.parameter_memory)
        else:
            kernels.native.topk_encode(m.e, *given)

    def serve(
        self, payloads: Sequence[Tensor], weights: Sequence[float], s: BlockedTensor, answer: Tensor
    ) -> None:
        """See :meth:`Fused.serve`."""
        given = self.compressor._given(s.blocks, answer)
        kernels.native.topk_encode(s.flat, *given, payloads=payloads, weight=weights[0])

    def receive(
        self, memory: Memory, sent: Tensor, payloads: Sequence[Tensor], weights: Sequence[float]
    ) -> None:
        """See :meth:`Fused.receive`."""
        m, given = memory, self.compressor._given(memory.blocks, payloads)
        kernels.native.topk_decode(m.x, *given, -weights[0], m.e, m.s, m.alpha, m.beta, m.parameter_memory)


def _pages(size: int) -> int:
    return -(-size // PAGE)


def _page_of_each(counts: Tensor, kept: int) -> Tensor:
    """Returns the page of each kept element, [blocks, kept], from `counts` of each page, [blocks, pages]."""
    if bool((counts < 0).any() | (counts.sum(dim=1) != kept).any()):
        raise ValueError(f"a Top-K payload whose pages' counts do not add up to the {kept} kept in a block.")
    pages = torch.arange(counts.shape[1], device=counts.device).repeat(counts.shape[0])
    return pages.repeat_interleave(counts.reshape(-1)).view(-1, kept)
