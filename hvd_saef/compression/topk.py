"""Top-K: only the largest entries of each block travel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.compression.blocks import BlockedTensor, Blocks
from hvd_saef.compression.compressor import Compressor

INDEX = torch.int32


@dataclass(frozen=True)
class TopKCompressor(Compressor):
    """Keeps each block's min(d, max(1, ⌈ratio·d⌉)) entries of largest magnitude, exactly.

    Ties go to the lower index. Payload: the kept indices within their blocks, ascending, int32, for
    all blocks; then their values in x's dtype.

    Raises TypeError or ValueError for a ratio that is not a number in (0, 1].
    """

    ratio: float

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)):
            raise TypeError(f"ratio={self.ratio!r}: a number above 0 and up to 1 is allowed (0.01 is 1 %).")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio!r}: a number above 0 and up to 1 is allowed (0.01 is 1 %).")
        object.__setattr__(self, "ratio", float(self.ratio))  # 1 and 1.0 are the same setting

    def kept(self, size: int) -> int:
        """How many of a block's `size` elements travel."""
        return min(size, max(1, math.ceil(self.ratio * size)))

    def payload_bytes(self, layout: Blocks) -> int:
        """Four bytes of index and one number of x's dtype for each kept element.

        Raises ValueError for a block whose indices do not fit into int32.
        """
        if layout.largest > torch.iinfo(INDEX).max:
            raise ValueError(
                f"a block of {layout.largest} elements is too large for Top-K, which sends 4-byte indices; "
                f"at most {torch.iinfo(INDEX).max} are allowed: set block_size to that or less."
            )
        return self._total_kept(layout) * (INDEX.itemsize + layout.dtype.itemsize)

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """See :meth:`Compressor.encode`."""
        indices, values = [], []
        for run, rows in delta.rows():
            columns = kernels.top_k(rows, self.kept(run.size))
            values.append(rows.gather(1, columns).view(-1))
            rows.scatter_(1, columns, 0.0)
            indices.append(columns.view(-1).to(INDEX))
        if indices:
            boundary = self._total_kept(delta.blocks) * INDEX.itemsize
            payload[:boundary] = torch.cat(indices).view(torch.uint8)
            payload[boundary:] = torch.cat(values).view(torch.uint8)

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """See :meth:`Compressor.decode_add`."""
        boundary = self._total_kept(out.blocks) * INDEX.itemsize
        indices = payload[:boundary].clone().view(INDEX).to(torch.int64)  # the clones are aligned
        values = payload[boundary:].clone().view(out.blocks.dtype) * weight
        start = 0
        for run, rows in out.rows():
            kept = self.kept(run.size)
            part = slice(start, start + run.count * kept)
            rows.scatter_add_(1, indices[part].view(run.count, kept), values[part].view(run.count, kept))
            start = part.stop

    def _total_kept(self, layout: Blocks) -> int:
        return sum(run.count * self.kept(run.size) for run in layout.runs)
