"""The compressors, the paper's C, each in a file of its own. Local: nothing here knows workers or MPI."""

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
    """The built-in compressors by name, as in `horovod.torch.Compression`."""

    none: ClassVar[Compressor] = NoneCompressor()
    """Sends dense values in x's dtype."""
    fp16: ClassVar[Compressor] = FP16Compressor()
    """Sends dense values in float16."""
    sign: ClassVar[Compressor] = SignCompressor()
    """Sends 1 bit for each parameter and one scale for each block."""

    @staticmethod
    def topk(ratio: float, value_dtype: torch.dtype | None = None) -> Compressor:
        """Returns a compressor that sends the share `ratio` of each block's entries, the largest ones.

        `ratio` is in (0, 1]; 0.01 is 1 %. A `value_dtype` of torch.float16 or torch.bfloat16 sends each value
        in 2 bytes instead of the 4 of a float32 x.
        """
        return TopKCompressor(ratio, value_dtype)


BUILT_IN: tuple[type[Compressor], ...] = (NoneCompressor, FP16Compressor, SignCompressor, TopKCompressor)
"""The compressors that come with the package, the least lossy first. All code that lists them reads this."""

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
