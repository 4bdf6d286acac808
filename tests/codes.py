"""Buckets that are unpleasant to compress, and the slow way to do what `hvd_saef.compression` does."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from hvd_saef import Compression, Compressor
from hvd_saef.compression import BlockedTensor, Blocks, SignCompressor, TopKCompressor

FLOAT16_MAX = 65504.0
RATIOS = [1e-9, 0.01, 0.1, 1 / 3, 0.5, 0.9, 1.0, 1]
ROUNDED = [Compression.topk(0.1, torch.float16), Compression.topk(1 / 3, torch.bfloat16)]
SOME_DENSE = [SignCompressor(dense_below=5), TopKCompressor(0.1, dense_below=5)]
TOPKS = [*ROUNDED, *map(Compression.topk, RATIOS)]
COMPRESSORS = [Compression.sign, *SOME_DENSE, *TOPKS, Compression.none, Compression.fp16]


@dataclass(frozen=True)
class Bucket:
    """Tensors of `sizes` elements laid end to end, cut into blocks of at most `block_size`."""

    values: Any  # a numpy array of float32 or float64
    sizes: list[int]
    block_size: int | None

    @property
    def blocks(self) -> Blocks:
        """The cut as the library has it."""
        return Blocks.cut(self.sizes, self.block_size, torch.from_numpy(self.values).dtype)

    @property
    def cuts(self) -> list[slice]:
        """Where each block lies."""
        ends = np.cumsum([0, *self.sizes]).tolist()
        return [
            slice(i, min(i + n, stop))
            for start, stop in itertools.pairwise(ends)
            for n in [self.block_size or max(1, stop - start)]
            for i in range(start, stop, n)
        ]


@dataclass(frozen=True)
class Coded:
    """What :func:`code` found."""

    payload: bytes
    sent: Any
    kept: Any


def code(compressor: Compressor, bucket: Bucket) -> Coded:
    """Through the payload and back. The payload starts as rubbish: all of it has to be written."""
    delta = torch.from_numpy(bucket.values.copy())
    payload = torch.full((compressor.payload_bytes(bucket.blocks),), 0xAA, dtype=torch.uint8)
    compressor.encode(BlockedTensor(delta, bucket.blocks), payload)
    sent = torch.zeros_like(delta)
    compressor.decode_add(payload, BlockedTensor(sent, bucket.blocks), 1.0)
    return Coded(payload.numpy().tobytes(), sent.numpy(), delta.numpy())


@st.composite
def buckets(draw: st.DrawFn, largest: float = math.inf) -> Bucket:
    """Zeros of both signs, ties, denormals and huge numbers, in any mixture and any cut."""
    dtype: Any = draw(st.sampled_from([np.float32, np.float64]))
    info = np.finfo(dtype)
    huge = float(dtype(min(largest, 1e37 if dtype is np.float32 else 1e300)))
    special = [0.0, 1.0, 1 / 3, float(info.tiny), float(info.smallest_subnormal), huge]
    number = st.floats(-huge, huge, width=info.bits) | st.sampled_from(
        [s * v for v in special for s in (1, -1)]
    )
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 7, 8, 9, 16, 17, 33, 40]), max_size=4))
    pool = draw(st.lists(number, min_size=1, max_size=30))  # few different numbers: ties
    values = draw(st.lists(st.sampled_from(pool), min_size=sum(sizes), max_size=sum(sizes)))
    return Bucket(np.array(values, dtype=dtype), sizes, draw(st.sampled_from([None, 1, 7, 17, 1000])))


def bucket_of(*values: float, block_size: int | None = None) -> Bucket:
    """One float32 tensor."""
    return Bucket(np.array(values, dtype=np.float32), [len(values)], block_size)


def exact(values: Any) -> list[Fraction]:
    """The numbers without rounding."""
    return [Fraction(float(value)) for value in values]


def tree(values: list[float]) -> float:
    """Σ|v| over the documented tree, one addition at a time.

    Lines of 16, the last one filled up with zeros; neighbouring lines are added until one is left;
    its halves are added until one number is left.
    """
    padded = [abs(v) for v in values] + [0.0] * (-len(values) % 16)
    lines = [padded[i : i + 16] for i in range(0, len(padded), 16)]
    while len(lines) > 1:
        paired = [
            [a + b for a, b in zip(*lines[i : i + 2], strict=True)] for i in range(0, len(lines) - 1, 2)
        ]
        lines = paired + (lines[-1:] if len(lines) % 2 else [])
    (line,) = lines
    while len(line) > 1:
        line = [a + b for a, b in zip(line[: len(line) // 2], line[len(line) // 2 :], strict=True)]
    return line[0]


def kept_by_topk(ratio: float, size: int) -> int:
    """How many elements of a block travel."""
    return min(size, max(1, math.ceil(ratio * size)))


def topk_bytes(ratio: float, size: int, number: int) -> int:
    """What a block takes on the wire: values of `number` bytes, offsets, and its pages' counts."""
    kept, pages = kept_by_topk(ratio, size), -(-size // 65536)
    return kept * number + (kept < size) * (kept * 2 + (pages > 1) * pages * 4)
