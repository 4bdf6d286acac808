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
from hvd_saef.kernels import Stretch


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

    def fused(self, device: torch.device, dtype: torch.dtype, alike: bool) -> Fused | None:
        """See :meth:`Compressor.fused`."""
        version = kernels.fusing(device, dtype, alike)
        own = type(self) is SignCompressor  # a subclass may encode otherwise
        return _FusedSign(self, version) if own and version else None

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """See :meth:`Compressor.encode`."""
        version = kernels.version_for(delta.flat.device, delta.flat.dtype)
        stretches = [Stretch(delta.flat, self._table(delta.blocks), payload)]
        version.sign_encode(stretches)
        version.sign_settle(stretches)

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """See :meth:`Compressor.decode_add`. Raises ValueError for a payload of another length."""
        version = kernels.version_for(out.flat.device, out.flat.dtype)
        stretch = Stretch(out.flat, self._table(out.blocks), payloads=[payload])
        version.sign_decode([stretch], weights=[weight])

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
    version: kernels.Version

    @property
    def narrow(self) -> bool:
        """See :attr:`Fused.narrow`."""
        return self.version.NARROW_POINTS

    def send(self, memories: Sequence[Memory], payloads: Sequence[Tensor]) -> None:
        """See :meth:`Fused.send`."""
        stretches = [
            memory.updated(self.compressor._table(memory.blocks), sent)
            for memory, sent in zip(memories, payloads, strict=True)
        ]
        self.version.sign_encode(stretches, memories[0].alpha, memories[0].beta)

    def serve(
        self, payloads: Sequence[Tensor], weights: Sequence[float], s: BlockedTensor, answer: Tensor
    ) -> None:
        """See :meth:`Fused.serve`."""
        runs = self.compressor._table(s.blocks)
        self.version.sign_encode([Stretch(s.flat, runs, answer, payloads=payloads)], weights=weights)
        self.version.sign_settle([Stretch(s.flat, runs, answer)])

    def receive(
        self,
        memories: Sequence[Memory],
        sent: Sequence[Tensor],
        payloads: Sequence[Sequence[Tensor]],
        weights: Sequence[float],
    ) -> None:
        """See :meth:`Fused.receive`."""
        stretches = [
            memory.landed(self.compressor._table(memory.blocks), own, arrived)
            for memory, own, arrived in zip(memories, sent, payloads, strict=True)
        ]
        minus = [-weight for weight in weights]
        self.version.sign_decode(stretches, memories[0].alpha, memories[0].beta, minus)


def _octets(bits: int) -> int:
    return -(-bits // 8)
