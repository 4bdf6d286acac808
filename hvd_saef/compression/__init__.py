"""C, the compressor: one file each. No workers, no MPI."""

from __future__ import annotations

from typing import ClassVar

import torch

from hvd_saef.compression.blocks import BlockedTensor, Blocks, Memory, Run
from hvd_saef.compression.compressor import Compressor, Considered, Fused, check_dense_below, state_dtype
from hvd_saef.compression.dense import DenseCompressor, FP16Compressor, NoneCompressor
from hvd_saef.compression.draws import Draws
from hvd_saef.compression.sign import SignCompressor
from hvd_saef.compression.topk import TopKCompressor


class Compression:
    """The compressors by name, as `horovod.torch.Compression` has them."""

    none: ClassVar[Compressor] = NoneCompressor()
    """Dense, in x's dtype."""
    fp16: ClassVar[Compressor] = FP16Compressor()
    """Dense, in float16."""
    sign: ClassVar[Compressor] = SignCompressor()
    """1 bit a parameter and a scale a block."""

    @staticmethod
    def topk(ratio: float, value_dtype: torch.dtype | None = None) -> Compressor:
        """The `ratio` (in (0, 1]; 0.01 is 1 %) of each block's entries that are largest.

        `value_dtype` torch.float16 or torch.bfloat16 sends them in 2 bytes instead of x's 4.
        """
        return TopKCompressor(ratio, value_dtype)


BUILT_IN: tuple[type[Compressor], ...] = (NoneCompressor, FP16Compressor, SignCompressor, TopKCompressor)
"""The compressors that come with the package, the least lossy first: all that lists compressors asks here."""

__all__ = [
    "BUILT_IN",
    "BlockedTensor",
    "Blocks",
    "Compression",
    "Compressor",
    "Considered",
    "DenseCompressor",
    "Draws",
    "FP16Compressor",
    "Fused",
    "Memory",
    "NoneCompressor",
    "Run",
    "SignCompressor",
    "TopKCompressor",
    "check_dense_below",
    "state_dtype",
]
