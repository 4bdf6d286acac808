"""Top-K: only the entries of largest magnitude of each block travel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.compression.blocks import BlockedTensor, Blocks, Memory
from hvd_saef.compression.compressor import Compressor, Considered, Fused, check_dense_below
from hvd_saef.kernels import Stretch
from hvd_saef.kernels.topk_format import sections_of


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
        return sum(sections_of(layout.table(self.kept), self._wire(layout.dtype)))

    def fused(self, device: torch.device, dtype: torch.dtype, alike: bool) -> Fused | None:
        """See :meth:`Compressor.fused`."""
        version = kernels.fusing(device, dtype, alike)
        own = type(self) is TopKCompressor  # a subclass may encode otherwise
        return _FusedTopK(self, version) if own and version else None

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """See :meth:`Compressor.encode`."""
        version = kernels.version_for(delta.flat.device, delta.flat.dtype)
        stretch = Stretch(delta.flat, delta.blocks.table(self.kept), payload)
        version.topk_encode([stretch], self._wire(delta.blocks.dtype))

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """See :meth:`Compressor.decode_add`. Raises ValueError for bytes that no encoder writes."""
        version = kernels.version_for(out.flat.device, out.flat.dtype)
        stretch = Stretch(out.flat, out.blocks.table(self.kept), payloads=[payload])
        version.topk_decode([stretch], self._wire(out.blocks.dtype), weights=[weight])

    def _wire(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype of the values that travel for x of `dtype`."""
        return self.value_dtype or dtype


@dataclass(frozen=True)
class _FusedTopK:
    """Computes the rows around C by kernels."""

    compressor: TopKCompressor
    version: kernels.Version

    @property
    def narrow(self) -> bool:
        """See :attr:`Fused.narrow`."""
        return self.version.NARROW_POINTS

    def send(self, memories: Sequence[Memory], payloads: Sequence[Tensor]) -> None:
        """See :meth:`Fused.send`."""
        pairs = zip(memories, payloads, strict=True)
        stretches = [
            memory.updated(memory.blocks.table(self.compressor.kept), sent) for memory, sent in pairs
        ]
        m = memories[0]
        self.version.topk_encode(stretches, self.compressor._wire(m.blocks.dtype), m.alpha, m.beta)

    def serve(
        self, payloads: Sequence[Tensor], weights: Sequence[float], s: BlockedTensor, answer: Tensor
    ) -> None:
        """See :meth:`Fused.serve`."""
        stretch = Stretch(s.flat, s.blocks.table(self.compressor.kept), answer, payloads=payloads)
        self.version.topk_encode([stretch], self.compressor._wire(s.blocks.dtype), weights=weights)

    def receive(
        self,
        memories: Sequence[Memory],
        sent: Sequence[Tensor],
        payloads: Sequence[Sequence[Tensor]],
        weights: Sequence[float],
    ) -> None:
        """See :meth:`Fused.receive`."""
        stretches = [
            memory.landed(memory.blocks.table(self.compressor.kept), None, arrived)
            for memory, arrived in zip(memories, payloads, strict=True)
        ]
        m, minus = memories[0], [-weight for weight in weights]
        self.version.topk_decode(stretches, self.compressor._wire(m.blocks.dtype), m.alpha, m.beta, minus)
