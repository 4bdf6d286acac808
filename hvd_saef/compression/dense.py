"""Compressors whose payloads are dense: Horovod's allreduce averages them, uncompressed or in float16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hvd_saef.compression.blocks import BlockedTensor, Blocks
from hvd_saef.compression.compressor import Compressor, Considered


class DenseCompressor(Compressor):
    """Sends each element as one number of the wire's dtype; what the cast rounds away stays in the error."""

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype that travels for x of `dtype`."""
        return dtype

    def payload_bytes(self, layout: Blocks) -> int:
        """Returns the number of elements times the bytes of the wire's dtype."""
        return layout.numel * self.wire_dtype(layout.dtype).itemsize

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """See :meth:`Compressor.encode`."""
        wire = payload.view(self.wire_dtype(delta.blocks.dtype))
        if wire.dtype == delta.flat.dtype:
            wire.copy_(delta.flat)
        else:
            most = torch.finfo(wire.dtype).max  # the excess stays in the error
            wire.copy_(delta.flat.clamp(-most, most))
        delta.flat.sub_(wire.to(delta.flat.dtype))

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """See :meth:`Compressor.decode_add`. Raises ValueError for a payload of another length."""
        if payload.numel() != self.payload_bytes(out.blocks):
            raise ValueError(
                f"a dense payload of {payload.numel()} bytes: {self.payload_bytes(out.blocks)} were expected."
            )
        out.flat.add_(payload.view(self.wire_dtype(out.blocks.dtype)).to(out.flat.dtype) * weight)


@dataclass(frozen=True)
class NoneCompressor(DenseCompressor):
    """C is the identity: the update travels as it is."""

    call = "hvd_saef.Compression.none"
    costs: ClassVar[tuple[str, ...]] = ("float32",)

    def work(self, encoded: float, decoded: float) -> dict[str, float]:
        """See :meth:`Compressor.work`."""
        return {"float32": encoded}

    @classmethod
    def considered(cls) -> Sequence[Considered]:
        """See :meth:`Compressor.considered`."""
        return [Considered("Horovod float32", "hvd", cls(), averaging_periods=())]


@dataclass(frozen=True)
class FP16Compressor(DenseCompressor):
    """C rounds to float16. The sum on the wire is rounded too, and that rounding error is lost."""

    call = "hvd_saef.Compression.fp16"
    costs: ClassVar[tuple[str, ...]] = ("float16",)

    def work(self, encoded: float, decoded: float) -> dict[str, float]:
        """See :meth:`Compressor.work`."""
        return {"float16": encoded}

    @classmethod
    def considered(cls) -> Sequence[Considered]:
        """See :meth:`Compressor.considered`."""
        return [Considered("Horovod fp16", "hvd-fp16", cls(), averaging_periods=())]

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns float16, whatever the dtype of x is."""
        return torch.float16
