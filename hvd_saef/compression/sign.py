"""Scaled sign, 1 bit a parameter: Eq. (2) of the paper, blockwise as in its reference [30]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.compression.blocks import BlockedTensor, Blocks, Memory
from hvd_saef.compression.compressor import Compressor, Fused


@dataclass(frozen=True)
class SignCompressor(Compressor):
    """C(v) = (‖v‖₁/d)·sign(v) for each block v of d elements.

    Payload: the scales ‖v‖₁/d of all blocks in x's dtype, then each block's sign bits, least
    significant bit first, from a fresh byte. The sign is the float's sign bit: 0.0 is +, -0.0 is -.
    """

    def payload_bytes(self, layout: Blocks) -> int:
        """One number of x's dtype a block and a bit an element, each block's bits in whole bytes."""
        return layout.count * layout.dtype.itemsize + sum(r.count * _octets(r.size) for r in layout.runs)

    @property
    def fused(self) -> Fused | None:
        """See :attr:`Compressor.fused`."""
        own = type(self) is SignCompressor  # a subclass may encode otherwise
        return _ROWS if own and kernels.available() else None

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """See :meth:`Compressor.encode`."""
        native = kernels.native_for(delta.flat)
        if native is None:
            _encode(delta, payload)
        else:
            native.sign_encode(delta.flat, _table(delta.blocks), payload)
            native.sign_settle(delta.flat, _table(delta.blocks), payload)

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """See :meth:`Compressor.decode_add`."""
        native = kernels.native_for(out.flat)
        if native is None:
            _decode_add(payload, out, weight)
        else:
            native.sign_decode(out.flat, _table(out.blocks), [payload], weight)


class FusedSign:
    """The rows around C by kernels. `send` leaves Δ in e, and `receive` subtracts C(Δ)."""

    def send(self, memory: Memory, payload: Tensor) -> None:
        """See :meth:`Fused.send`."""
        m, runs = memory, _table(memory.blocks)
        if m.points:
            kernels.native.sign_encode(m.e, runs, payload, m.x, m.s, m.alpha, m.beta, m.points)
        else:
            kernels.native.sign_encode(m.e, runs, payload)

    def serve(self, payloads: Sequence[Tensor], weight: float, s: BlockedTensor, answer: Tensor) -> None:
        """See :meth:`Fused.serve`."""
        runs = _table(s.blocks)
        kernels.native.sign_encode(s.flat, runs, answer, payloads=payloads, weight=weight)
        kernels.native.sign_settle(s.flat, runs, answer)

    def receive(self, memory: Memory, sent: Tensor, payloads: Sequence[Tensor], weight: float) -> None:
        """See :meth:`Fused.receive`."""
        m = memory
        kernels.native.sign_decode(
            m.x, _table(m.blocks), payloads, -weight, m.e, sent, m.s, m.alpha, m.beta, m.points
        )


_ROWS = FusedSign()


def _encode(delta: BlockedTensor, payload: Tensor) -> None:
    """SignCompressor.encode on any device."""
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


def _decode_add(payload: Tensor, out: BlockedTensor, weight: float) -> None:
    """SignCompressor.decode_add on any device."""
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


def _table(blocks: Blocks) -> Tensor:
    return blocks.table(_kept)


def _kept(size: int) -> int:
    return 0  # no block travels dense


def _octets(bits: int) -> int:
    return -(-bits // 8)
