"""Scaled sign, 1 bit a parameter: Eq. (2) of the paper, blockwise as in its reference [30]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.compression.blocks import BlockedTensor, Blocks
from hvd_saef.compression.compressor import Compressor


@dataclass(frozen=True)
class SignCompressor(Compressor):
    """C(v) = (‖v‖₁/d)·sign(v) for each block v of d elements.

    Payload: the scales ‖v‖₁/d of all blocks in x's dtype, then each block's sign bits, least
    significant bit first, from a fresh byte. The sign is the float's sign bit: 0.0 is +, -0.0 is -.
    """

    def payload_bytes(self, layout: Blocks) -> int:
        """One number of x's dtype a block and a bit an element, each block's bits in whole bytes."""
        return layout.count * layout.dtype.itemsize + sum(r.count * _octets(r.size) for r in layout.runs)

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """See :meth:`Compressor.encode`."""
        start, scale_bytes = delta.blocks.count * delta.blocks.dtype.itemsize, []
        for run, rows in delta.rows():
            scales = (kernels.l1_norms(rows) / run.size).to(rows.dtype)
            bits = kernels.pack_signs(rows)
            payload[start : start + bits.numel()] = bits.view(-1)
            start += bits.numel()
            column = scales.unsqueeze(1)
            rows.sub_(torch.where(torch.signbit(rows), -column, column))
            scale_bytes.append(scales.view(torch.uint8))
        if scale_bytes:
            torch.cat(scale_bytes, out=payload[: delta.blocks.count * delta.blocks.dtype.itemsize])

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """See :meth:`Compressor.decode_add`."""
        start = out.blocks.count * out.blocks.dtype.itemsize
        scales = payload[:start].clone().view(out.blocks.dtype) * weight  # the clone is aligned
        first = 0
        for run, rows in out.rows():
            octets = _octets(run.size)
            bits = payload[start : start + run.count * octets].view(run.count, octets)
            start += bits.numel()
            column = scales[first : first + run.count].unsqueeze(1)
            first += run.count
            rows.add_(torch.where(kernels.unpack_signs(bits, run.size), -column, column))


def _octets(bits: int) -> int:
    return -(-bits // 8)
