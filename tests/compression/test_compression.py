"""C: what travels and what stays, on inputs chosen to be unpleasant.

Values are compared as exact fractions, so that a tolerance is the library's own rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_saef import Compression, Compressor
from hvd_saef.compression import (
    BlockedTensor,
    Blocks,
    FP16Compressor,
    Run,
    SignCompressor,
    TopKCompressor,
)
from tests.codes import (
    COMPRESSORS,
    FLOAT16_MAX,
    RATIOS,
    SOME_DENSE,
    Bucket,
    bucket_of,
    buckets,
    code,
    exact,
    kept_by_topk,
    tree,
)

pytestmark = pytest.mark.both_arithmetics

# -- the checks, for the library's compressors and for the broken ones below ------------------------


def check_split(compressor: Compressor, bucket: Bucket) -> None:
    """What is sent and what is kept add up to the input.

    Exactly, but for Sign and what 16 bits cannot hold: there, to the one rounding of v - sent, half a
    unit of its last place.
    """
    coded = code(compressor, bucket)
    assert np.isfinite(coded.sent).all()
    value_dtype = (
        torch.float16 if isinstance(compressor, FP16Compressor) else compressor.__dict__.get("value_dtype")
    )
    largest = torch.finfo(value_dtype or torch.float64).max
    half = Fraction(float(np.finfo(bucket.values.dtype).eps)) / 2
    for v, sent, kept in zip(exact(bucket.values), exact(coded.sent), exact(coded.kept), strict=True):
        allowed = half * abs(v - sent) if abs(v) > largest or isinstance(compressor, SignCompressor) else 0
        assert abs(sent + kept - v) <= allowed
    assert np.array_equal(coded.kept, bucket.values - coded.sent)


def check_sign_norm(compressor: Compressor, bucket: Bucket) -> None:
    """‖C(v) - v‖² = ‖v‖² - ‖v‖₁²/d, which is at most (1 - 1/d)‖v‖² (Assumption 4).

    With a scale that is off by r the left side is exactly d·r² larger. Off is the scale by less than
    16 roundings (at most 9 additions one above the other, a division, a cast) and one denormal.
    """
    info, sent = np.finfo(bucket.values.dtype), code(compressor, bucket).sent
    for cut in bucket.cuts:
        v, d = exact(bucket.values[cut]), cut.stop - cut.start
        square, l1 = sum(x * x for x in v), sum(map(abs, v))
        missing = sum((s - x) ** 2 for s, x in zip(exact(sent[cut]), v, strict=True))
        off = 8 * Fraction(float(info.eps)) * l1 / d + Fraction(float(info.smallest_subnormal))
        assert 0 <= missing - (square - l1 * l1 / d) <= d * off**2
        assert missing <= (1 - Fraction(1, d)) * square + d * off**2


def check_topk_norm(compressor: Compressor, bucket: Bucket) -> None:
    """‖C(v) - v‖² is exactly the sum of the d - k smallest squares, at most (1 - k/d)‖v‖²."""
    assert isinstance(compressor, TopKCompressor)
    sent = code(compressor, bucket).sent
    for cut in bucket.cuts:
        v, d = exact(bucket.values[cut]), cut.stop - cut.start
        k = kept_by_topk(compressor.ratio, d)
        missing = sum((s - x) ** 2 for s, x in zip(exact(sent[cut]), v, strict=True))
        assert missing == sum(sorted(x * x for x in v)[: d - k])
        assert missing <= (1 - Fraction(k, d)) * sum(x * x for x in v)


def check_sign_wire(compressor: Compressor, bucket: Bucket) -> None:
    """All scales, then each block's sign bits from a fresh byte, the first in the lowest place."""
    scales, bits = b"", b""
    for cut in bucket.cuts:
        block = bucket.values[cut]
        scales += (np.float64(tree(block.tolist())) / block.size).astype(block.dtype).tobytes()
        bits += np.packbits(np.signbit(block), bitorder="little").tobytes()
    coded = code(compressor, bucket)
    assert coded.payload == scales + bits
    signed = np.copysign(coded.sent, bucket.values)  # decoding adds to 0.0, which loses the sign of a zero
    assert coded.kept.tobytes() == (bucket.values - signed).tobytes()


def check_topk_wire(compressor: Compressor, bucket: Bucket) -> None:
    """Counts of blocks of several pages, all values, all offsets (of what is whole: none). To the bit."""
    assert isinstance(compressor, TopKCompressor)
    counts, values, offsets = b"", b"", b""
    for cut in bucket.cuts:
        block = bucket.values[cut]
        largest = sorted(range(block.size), key=lambda i: (-abs(block[i]), i))
        chosen = np.array(sorted(largest[: kept_by_topk(compressor.ratio, block.size)]))
        values += wire_values(compressor, block[chosen])
        if chosen.size < block.size:
            offsets += (chosen % 65536).astype(np.uint16).tobytes()
            pages = -(-block.size // 65536)
            counts += np.bincount(chosen // 65536, minlength=pages).astype(np.int32).tobytes() * (pages > 1)
    assert code(compressor, bucket).payload == counts + values + offsets


def wire_values(compressor: TopKCompressor, values: Any) -> bytes:
    """Numbers as they travel: as they are, or in 16 bits, those beyond the range as the largest."""
    numbers = torch.from_numpy(values)
    if compressor.value_dtype is not None:
        largest = torch.finfo(compressor.value_dtype).max
        numbers = numbers.clamp(-largest, largest).to(compressor.value_dtype)
    return numbers.view(torch.uint8).numpy().tobytes()


quick = settings(max_examples=100, deadline=None)


@quick
@given(buckets(), st.sampled_from([c for c in COMPRESSORS if c is not Compression.fp16]))
def test_sent_and_kept_add_up(bucket: Bucket, compressor: Compressor) -> None:
    check_split(compressor, bucket)


@quick
@given(buckets(largest=FLOAT16_MAX))
def test_what_fp16_rounds_away_is_kept(bucket: Bucket) -> None:
    check_split(Compression.fp16, bucket)
    coded = code(Compression.fp16, bucket)
    assert np.array_equal(np.frombuffer(coded.payload, np.float16), coded.sent)
    assert np.all(np.abs(coded.kept) <= 2**-10 * np.abs(bucket.values) + 2**-24)


def test_what_is_too_large_for_fp16_is_kept() -> None:
    check_split(Compression.fp16, bucket_of(1e5, -3e37, 1.0))


@quick
@given(buckets(), st.sampled_from(SOME_DENSE))
def test_small_blocks_travel_as_they_are(bucket: Bucket, compressor: Compressor) -> None:
    """To the bit and with no error; and the payload is as long as that takes."""
    coded = code(compressor, bucket)
    plain = [Compression.sign, Compression.topk(0.1)][isinstance(compressor, TopKCompressor)]
    length = 0
    for run in bucket.blocks.runs:
        part = slice(run.start, run.stop)
        if run.size < 5:
            assert np.array_equal(coded.sent[part].view(np.uint8), (bucket.values[part] + 0.0).view(np.uint8))
            assert not coded.kept[part].any()
            length += run.size * run.count * bucket.values.itemsize
        else:
            length += plain.payload_bytes(Blocks((Run(0, run.size, run.count),), bucket.blocks.dtype))
    assert len(coded.payload) == length


@quick
@given(buckets())
def test_sign(bucket: Bucket) -> None:
    check_sign_wire(Compression.sign, bucket)
    check_sign_norm(Compression.sign, bucket)


@quick
@given(buckets(), st.sampled_from(RATIOS))
def test_topk(bucket: Bucket, ratio: float) -> None:
    check_topk_wire(Compression.topk(ratio), bucket)
    check_topk_norm(Compression.topk(ratio), bucket)
    check_topk_wire(Compression.topk(ratio, torch.float16), bucket)
    check_topk_wire(Compression.topk(ratio, torch.bfloat16), bucket)


@pytest.mark.parametrize("ratio", [1e-9, 0.01, 0.5, 1])
@pytest.mark.parametrize("block_size", [None, 65535, 65536, 65537])
def test_topk_in_pages(ratio: float, block_size: int | None) -> None:
    """Blocks of one page and of several, some pages without anything kept."""
    values = np.random.default_rng(0).standard_normal(140_000).astype(np.float32).round(2)
    values[65536:131072] *= 1e-3
    bucket = Bucket(values, [3, 139_997], block_size)
    for dtype in (None, torch.float16):
        check_topk_wire(Compression.topk(ratio, dtype), bucket)
        coded = code(Compression.topk(ratio, dtype), bucket)
        assert np.array_equal(coded.sent + coded.kept, bucket.values)


def test_what_no_topk_encoder_writes_is_refused() -> None:
    """Counts that do not add up or are negative, offsets that repeat or lie beyond the block."""
    size, compressor = 65540, Compression.topk(3 / 65540)
    blocks, out = Blocks.cut([size], None, torch.float32), torch.zeros(size)

    def decode(counts: list[int], offsets: list[int]) -> None:
        numbers = (np.array(counts, np.int32), np.ones(3, np.float32), np.array(offsets, np.uint16))
        payload = torch.frombuffer(bytearray(b"".join(n.tobytes() for n in numbers)), dtype=torch.uint8)
        compressor.decode_add(payload, BlockedTensor(out, blocks), 1.0)

    decode([1, 2], [5, 0, 3])
    assert out.nonzero()[:, 0].tolist() == [5, 65536, 65539]
    for counts in ([1, 1], [2, 2], [-1, 4], [3, 0]):
        with pytest.raises(ValueError, match="payload"):
            decode(counts, [5, 0, 3])
    for offsets in ([5, 0, 4], [5, 3, 3], [5, 3, 0]):
        with pytest.raises(ValueError, match=r"payload.* offsets|offsets .*payload"):
            decode([1, 2], offsets)
    with pytest.raises(ValueError, match="payload"):
        compressor.decode_add(torch.zeros(25, dtype=torch.uint8), BlockedTensor(out, blocks), 1.0)


@quick
@given(buckets())
def test_none_sends_everything(bucket: Bucket) -> None:
    coded = code(Compression.none, bucket)
    assert coded.payload == bucket.values.tobytes()
    assert not coded.kept.any()


@quick
@given(buckets(largest=FLOAT16_MAX), st.sampled_from(COMPRESSORS))
def test_blocks_are_independent(bucket: Bucket, compressor: Compressor) -> None:
    together = code(compressor, bucket)
    for cut in bucket.cuts:
        alone = code(compressor, Bucket(bucket.values[cut], [cut.stop - cut.start], None))
        assert alone.sent.tobytes() == together.sent[cut].tobytes()
        assert alone.kept.tobytes() == together.kept[cut].tobytes()


@quick
@given(
    buckets(largest=FLOAT16_MAX),
    st.sampled_from(COMPRESSORS),
    st.sampled_from([1.0, -1.0, 0.25, -1 / 3, 0.0]),
)
def test_decoding_adds_with_a_weight(bucket: Bucket, compressor: Compressor, weight: float) -> None:
    coded, dtype = code(compressor, bucket), bucket.values.dtype.type
    before = np.cos(np.arange(bucket.values.size)).astype(dtype)
    out = torch.from_numpy(before.copy())
    odd = compressor.wire_dtype(torch.float32) is None  # the address: a sharded server cuts payloads anywhere
    payload = torch.frombuffer(bytearray(odd * b"?" + coded.payload + b"?"), dtype=torch.uint8)[odd:-1]
    for _ in range(2):
        compressor.decode_add(payload, BlockedTensor(out, bucket.blocks), weight)
    assert np.array_equal(out.numpy(), (before + coded.sent * dtype(weight)) + coded.sent * dtype(weight))


# -- counter-tests: each check catches a compressor that is broken in its way -------------------------


@dataclass(frozen=True)
class ThreeValued(SignCompressor):
    """sign(0) = 0: what torch.sign gives. Zeros get nothing."""

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """As the class says."""
        zeros = delta.flat == 0
        super().encode(delta, payload)
        delta.flat[zeros] = 0.0


@dataclass(frozen=True)
class WrongScale(SignCompressor):
    """Scales by ‖v‖₁/(d + 1), and keeps the right rest of it. For one block."""

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """As the class says."""
        whole, sent = delta.flat.clone(), torch.zeros_like(delta.flat)
        super().encode(delta, payload)
        scale = payload[: delta.blocks.dtype.itemsize].view(delta.blocks.dtype)
        scale.mul_(whole.numel() / (whole.numel() + 1))
        self.decode_add(payload, BlockedTensor(sent, delta.blocks), 1.0)
        delta.flat.copy_(whole - sent)


@dataclass(frozen=True)
class Forgetful(SignCompressor):
    """Keeps no error."""

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """As the class says."""
        super().encode(delta, payload)
        delta.flat.zero_()


@dataclass(frozen=True)
class HighestBitFirst(SignCompressor):
    """Packs bits the other way round, and unpacks them so: the wire is not ours, but it works."""

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """As the class says."""
        super().encode(delta, payload)
        scales = delta.blocks.count * delta.blocks.dtype.itemsize
        flipped = np.unpackbits(payload[scales:].numpy()[:, None], axis=1, bitorder="little")
        payload[scales:] = torch.from_numpy(np.packbits(flipped, axis=1, bitorder="big")[:, 0])


@dataclass(frozen=True)
class LaterTies(TopKCompressor):
    """Of equal magnitudes keeps the one of the higher index. For one block of a page, not kept whole."""

    def order(self, block: Tensor) -> Tensor:
        """Indices, those to keep first."""
        return block.numel() - 1 - torch.argsort(block.flip(0).abs(), descending=True, stable=True)

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """As the class says."""
        chosen = self.order(delta.flat)[: self.kept(delta.blocks.numel)].sort().values
        offsets = chosen.to(torch.uint16)
        payload.copy_(torch.cat([delta.flat[chosen].view(torch.uint8), offsets.view(torch.uint8)]))
        delta.flat[chosen] = 0.0


@dataclass(frozen=True)
class FirstComeFirstServed(LaterTies):
    """Keeps the first entries, as a badly sampled threshold may."""

    def order(self, block: Tensor) -> Tensor:
        """As they come."""
        return torch.arange(block.numel())


Check = Callable[[Compressor, Bucket], None]


@pytest.mark.parametrize(
    ("broken", "right", "check", "values"),
    [
        (ThreeValued(), Compression.sign, check_split, (3.0, 0.0, -1.0)),
        (ThreeValued(), Compression.sign, check_sign_wire, (3.0, 0.0, -1.0)),
        (WrongScale(), Compression.sign, check_sign_norm, (3.0, 2.0, -1.0)),
        (WrongScale(), Compression.sign, check_sign_wire, (3.0, 2.0, -1.0)),
        (Forgetful(), Compression.sign, check_split, (3.0, 2.0, -1.0)),
        (HighestBitFirst(), Compression.sign, check_sign_wire, (3.0, 2.0, -1.0)),
        (LaterTies(0.5), Compression.topk(0.5), check_topk_wire, (1.0, -2.0, 2.0, 2.0)),
        (FirstComeFirstServed(0.5), Compression.topk(0.5), check_topk_norm, (1.0, -2.0, 3.0, 2.0)),
    ],
    ids=lambda value: (
        type(value).__name__ if isinstance(value, Compressor) else getattr(value, "__name__", "")
    ),
)
def test_broken_compressors_are_caught(
    broken: Compressor, right: Compressor, check: Check, values: tuple[float, ...]
) -> None:
    check(right, bucket_of(*values))
    with pytest.raises(AssertionError):
        check(broken, bucket_of(*values))
