"""Scaled sign, 1 bit a parameter: Eq. (2) of the paper, blockwise as in its reference [30]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.compression.blocks import BlockedTensor, Blocks, Memory, Run
from hvd_saef.compression.compressor import Compressor, Considered, Fused, check_dense_below


@dataclass(frozen=True)
class SignCompressor(Compressor):
    """C(v) = (‖v‖₁/d)·sign(v) for each block v of d elements; v itself for d < `dense_below`.

    The payload begins with the scales ‖v‖₁/d of all blocks in x's dtype; an uncompressed block has its
    elements there instead. The sign bits of the compressed blocks follow, least significant bit first; each
    block begins with a new byte. The sign is the float's sign bit: 0.0 is +, -0.0 is -.

    Raises TypeError or ValueError for a `dense_below` that is not a whole number >= 0.
    """

    dense_below: int = field(default=0, kw_only=True)
    """Blocks of fewer elements travel uncompressed."""

    def __post_init__(self) -> None:
        check_dense_below(self.dense_below)

    def uncompressed(self, size: int) -> bool:
        """Returns True if blocks of `size` elements travel uncompressed."""
        return size < self.dense_below

    call = "hvd_saef.Compression.sign"
    costs: ClassVar[tuple[str, ...]] = ("sign_encode", "sign_decode")

    def work(self, encoded: float, decoded: float) -> dict[str, float]:
        """See :meth:`Compressor.work`."""
        return {"sign_encode": encoded, "sign_decode": decoded}

    @classmethod
    def considered(cls) -> Sequence[Considered]:
        """See :meth:`Compressor.considered`."""
        return [
            Considered("sign SC", "sign-sc", cls(), double_compression=False, averaging_periods=(16,)),
            Considered("sign DC", "sign-dc", cls()),
        ]

    def payload_bytes(self, layout: Blocks) -> int:
        """Returns the bytes: a number of x's dtype a block, and a bit an element, in whole bytes a block."""
        return sum(self._sections(layout))

    @property
    def fused(self) -> Fused | None:
        """See :attr:`Compressor.fused`."""
        own = type(self) is SignCompressor  # a subclass may encode otherwise
        return _FusedSign(self) if own and kernels.available() else None

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """See :meth:`Compressor.encode`."""
        native = kernels.native_for(delta.flat)
        if native is None:
            self._encode(delta, payload)
        else:
            native.sign_encode(delta.flat, self._table(delta.blocks), payload)
            native.sign_settle(delta.flat, self._table(delta.blocks), payload)

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """See :meth:`Compressor.decode_add`."""
        native = kernels.native_for(out.flat)
        if native is None:
            self._decode_add(payload, out, weight)
        else:
            native.sign_decode(out.flat, self._table(out.blocks), [payload], weight)

    def _encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """Does what :meth:`encode` does, in plain torch on any device."""
        heads, bits = [], []
        for run, rows in delta.rows():
            if self.uncompressed(run.size):
                heads.append(rows.clone().view(-1))
                rows.zero_()
                continue
            scales = (kernels.l1_norms(rows) / run.size).to(rows.dtype)
            bits.append(kernels.pack_signs(rows).view(-1))
            column = scales.unsqueeze(1)
            rows.sub_(torch.where(torch.signbit(rows), -column, column))
            heads.append(scales)
        torch.cat([payload[:0], *(head.view(torch.uint8) for head in heads), *bits], out=payload)

    def _decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """Does what :meth:`decode_add` does, in plain torch on any device."""
        start, rest = self._sections(out.blocks)
        if payload.numel() != start + rest:
            raise ValueError(f"a sign payload of {payload.numel()} bytes: {start + rest} were expected.")
        heads = payload[:start].clone().view(out.blocks.dtype) * weight  # the clone is aligned
        first = 0
        for run, rows in out.rows():
            head = heads[first : first + self._head(run)]
            first += head.numel()
            if self.uncompressed(run.size):
                rows.add_(head.view(rows.shape))
                continue
            octets = _octets(run.size)
            bits = payload[start : start + run.count * octets].view(run.count, octets)
            start += bits.numel()
            column = head.unsqueeze(1)
            rows.add_(torch.where(kernels.unpack_signs(bits, run.size), -column, column))

    def _head(self, run: Run) -> int:
        """Returns how many numbers the run's blocks have in the payload's first part."""
        return run.count * (run.size if self.uncompressed(run.size) else 1)

    def _sections(self, blocks: Blocks) -> tuple[int, int]:
        """Returns the bytes of the payload's two parts: the numbers, and the sign bits."""
        numbers = sum(self._head(run) for run in blocks.runs)
        bits = sum(run.count * _octets(run.size) for run in blocks.runs if not self.uncompressed(run.size))
        return numbers * blocks.dtype.itemsize, bits

    def _table(self, blocks: Blocks) -> Tensor:
        return blocks.table(self._kept)

    def _kept(self, size: int) -> int:
        """Returns for kernels how many elements of a block travel uncompressed: all `size` or none."""
        return size if self.uncompressed(size) else 0


@dataclass(frozen=True)
class _FusedSign:
    """Computes the rows around C by kernels. `send` leaves Δ in e, and `receive` subtracts C(Δ) from e."""

    compressor: SignCompressor

    def send(self, memory: Memory, payload: Tensor) -> None:
        """See :meth:`Fused.send`."""
        m, runs = memory, self.compressor._table(memory.blocks)
        if m.parameter_memory:
            kernels.native.sign_encode(m.e, runs, payload, m.x, m.s, m.alpha, m.beta, m.parameter_memory)
        else:
            kernels.native.sign_encode(m.e, runs, payload)

    def serve(
        self, payloads: Sequence[Tensor], weights: Sequence[float], s: BlockedTensor, answer: Tensor
    ) -> None:
        """See :meth:`Fused.serve`."""
        runs = self.compressor._table(s.blocks)
        kernels.native.sign_encode(s.flat, runs, answer, payloads=payloads, weight=weights[0])
        kernels.native.sign_settle(s.flat, runs, answer)

    def receive(
        self, memory: Memory, sent: Tensor, payloads: Sequence[Tensor], weights: Sequence[float]
    ) -> None:
        """See :meth:`Fused.receive`."""
        m, runs = memory, self.compressor._table(memory.blocks)
        kernels.native.sign_decode(
            m.x, runs, payloads, -weights[0], m.e, sent, m.s, m.alpha, m.beta, m.parameter_memory
        )


def _octets(bits: int) -> int:
    return -(-bits // 8)
