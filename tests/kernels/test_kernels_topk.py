"""The Top-K kernels give the twins' bits: all instruction sets, any number of threads, all blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.compression import BlockedTensor, Blocks, Memory, TopKCompressor
from hvd_saef.memory.algorithm import PlainRows
from tests.codes import RATIOS, Bucket, buckets
from tests.kernels.versions import Direct, compiled

SETS = compiled.instruction_sets() if compiled else []
HERE = torch.device("cpu")
DTYPES = [torch.float32, torch.float64]
VALUES = [None, torch.float16, torch.bfloat16]
PAGE = 65536

pytestmark = pytest.mark.skipif(not SETS, reason="no kernels here")


def everywhere() -> Iterator[int]:
    """With every instruction set that this CPU has, and 1 thread; the best one also with 2 and 3."""
    set_before, threads_before = compiled.set_instruction_set("baseline"), torch.get_num_threads()
    try:
        for name, threads in (*((name, 1) for name in SETS), (SETS[-1], 2), (SETS[-1], 3)):
            compiled.set_instruction_set(name)
            torch.set_num_threads(threads)
            yield threads
    finally:
        compiled.set_instruction_set(set_before)
        torch.set_num_threads(threads_before)


Coded = tuple[Tensor, Tensor, Tensor]


def coded(compressor: TopKCompressor, blocks: Blocks, values: Tensor) -> Coded:
    """The payload, what is left of the values, and what two payloads add to ones."""
    rest, out = values.clone(), torch.ones_like(values)
    payload = torch.full((compressor.payload_bytes(blocks) + 1,), 0xAA, dtype=torch.uint8)[
        1:
    ]  # at an odd byte
    compressor.encode(BlockedTensor(rest, blocks), payload)
    for weight in (0.3, -1.0):
        compressor.decode_add(payload, BlockedTensor(out, blocks), weight)
    return payload, rest, out


def by_twins(compressor: TopKCompressor, blocks: Blocks, values: Tensor) -> Coded:
    """The same without kernels."""
    with kernels.only("twins"):
        return coded(compressor, blocks, values)


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """To the bit."""
    return all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(one, other, strict=True))


def check(compressor: TopKCompressor, blocks: Blocks, values: Tensor) -> None:
    """Kernels and twins agree."""
    expected = by_twins(compressor, blocks, values)
    for _ in everywhere():
        assert same(coded(compressor, blocks, values), expected)


@settings(max_examples=150, deadline=None)
@given(buckets(), st.sampled_from(RATIOS), st.sampled_from(VALUES))
def test_unpleasant_buckets(bucket: Bucket, ratio: float, value_dtype: Any) -> None:
    check(TopKCompressor(ratio, value_dtype), bucket.blocks, torch.from_numpy(bucket.values))


def normal(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=dtype)


def ties(size: int, dtype: torch.dtype) -> Tensor:
    return (normal(size, dtype) * 3).round() / 3


def mostly_zeros(size: int, dtype: torch.dtype) -> Tensor:
    """Zeros of both signs and few numbers."""
    values = normal(size, dtype)
    return torch.where(values.abs() > 2.8, values, torch.copysign(torch.zeros_like(values), values))


def clustered(size: int, dtype: torch.dtype) -> Tensor:
    """All that is large lies in one place."""
    values = normal(size, dtype)
    values[: size // 2] *= 1e-30
    values[size * 3 // 4 :] *= torch.finfo(dtype).tiny * 2
    return values


CUTS: list[tuple[list[int], int | None]] = [
    ([1, 2, 3, 63, 64, 65, 0, 600, 1000, PAGE - 1, PAGE, PAGE + 1, 200_001], None),
    ([PAGE + 1] * 7, None),  # more blocks than threads
    ([1000, 140_000], 64),
    ([1000, 140_000], 1000),
    ([300_000], 70_000),
    ([1] * 200, None),
    ([], None),
]


@pytest.mark.parametrize("make", [normal, ties, mostly_zeros, clustered])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_all_sizes(dtype: torch.dtype, make: Any) -> None:
    for number, (sizes, block_size) in enumerate(CUTS):
        blocks = Blocks.cut(sizes, block_size, dtype)
        values = make(blocks.numel, dtype)
        for ratio in (1e-9, 0.01, 0.3, 1):
            check(TopKCompressor(ratio, VALUES[number % 3]), blocks, values)


def sampled(size: int) -> list[int]:
    """Where the kernel looks when it guesses a block's threshold (topk_select.h, `guess`)."""
    samples = int(2 * size**0.5)
    stride, random, places = size // samples, 0x9E3779B97F4A7C15, []
    for i in range(samples):
        random = (random * 6364136223846793005 + 1442695040888963407) % 2**64
        places.append(i * stride + ((random >> 48) * stride >> 16))
    return places


@pytest.mark.parametrize("size", [40_000, 200_000])
def test_misleading_samples(size: int) -> None:
    """A guess that is too high, and one that is too low, cost time but change nothing."""
    blocks, compressor = Blocks.cut([size], None, torch.float32), TopKCompressor(0.05)
    high, low = normal(size, torch.float32), normal(size, torch.float32)
    high[sampled(size)] *= 100
    low[sampled(size)] *= 0
    assert (high.abs() > high[sampled(size)].abs().quantile(0.8)).sum() < compressor.kept(size)
    check(compressor, blocks, high)
    check(compressor, blocks, low)


def test_more_than_there_is_room_for() -> None:
    """Of a block of zeros, or with a large ratio, more is collected than is stored."""
    size = (1 << 21) + 100_000
    blocks = Blocks.cut([1000, size, 1000], None, torch.float32)
    check(TopKCompressor(0.01), blocks, mostly_zeros(blocks.numel, torch.float32) * 0)
    check(TopKCompressor(0.97), blocks, normal(blocks.numel, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nans(dtype: torch.dtype) -> None:
    """They are the largest, and equal to each other."""
    for size in (100, 3000, PAGE + 1):
        values = normal(size, dtype)
        values[::40] = torch.inf
        values[7::90] = -torch.inf
        values[20::60] = torch.nan
        check(TopKCompressor(0.02), Blocks.cut([size], None, dtype), values)


# -- the rows around C -------------------------------------------------------------------------------


def memory(blocks: Blocks, sizes: list[int], alpha: float, beta: float) -> Memory:
    """Some state of a worker."""
    generator = torch.Generator().manual_seed(7)
    x, e, s, points = (
        torch.randn(blocks.numel, generator=generator, dtype=blocks.dtype) * scale
        for scale in (1, 0.01, 0.02, 1)
    )
    pieces = [piece.clone() for piece in points.split(sizes)]
    return Memory(blocks, x, e, s if beta else None, pieces, alpha, beta)


def a_round(rows: Any, compressor: TopKCompressor, m: Memory, shown: bool) -> list[Tensor]:
    """Everything that a round leaves behind."""
    m = m if shown else Memory(m.blocks, m.x, m.e, m.s, (), m.alpha, m.beta)
    server = BlockedTensor(torch.sin(torch.arange(m.blocks.numel)).to(m.blocks.dtype) / 50, m.blocks)
    sent, answer, other = (
        torch.empty(compressor.payload_bytes(m.blocks), dtype=torch.uint8) for _ in range(3)
    )
    rows.send([m], [sent])
    PlainRows(compressor).send([Memory(m.blocks, m.x, m.x.roll(1), None, (), 0.0, 0.0)], [other])
    rows.serve([sent, other, sent], 3 * [1 / 3], server, answer)
    left = [m.e.clone()]
    rows.receive([m], [sent], [[answer, other]], [0.7, 0.7])
    return [sent, answer, *left, server.flat, m.x, m.e, *m.parameter_memory]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [0.01, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 0.0), (0.3, 0.6), (0.0, 1.0)])
def test_fused_rows(dtype: torch.dtype, ratio: float, alpha: float, beta: float) -> None:
    for number, (sizes, block_size) in enumerate((([70, 1, PAGE + 3, 2500], None), ([70, 9000], 1000))):
        blocks = Blocks.cut(sizes, block_size, dtype)
        compressor = TopKCompressor(ratio, VALUES[number])
        for shown in (True, False):
            with kernels.only("twins"):
                assert compressor.fused(HERE, dtype, True) is None
                plain = a_round(PlainRows(compressor), compressor, memory(blocks, sizes, alpha, beta), shown)
            for _ in everywhere():
                fused = a_round(
                    compressor.fused(HERE, dtype, True), compressor, memory(blocks, sizes, alpha, beta), shown
                )
                assert same(fused, plain)
            other = a_round(
                compressor.fused(HERE, dtype, True),
                compressor,
                memory(blocks, sizes, alpha + 0.1, beta),
                shown,
            )
            assert same(fused, other) is not shown  # the counter-check


# -- what is refused -----------------------------------------------------------------------------------


def encode(**changed: Any) -> None:
    """A right call, but for what is changed."""
    blocks, compressor = Blocks.cut([100], None, torch.float32), TopKCompressor(0.1)
    given = {
        "delta": torch.ones(100),
        "runs": blocks.table(compressor.kept),
        "payload": torch.empty(60, dtype=torch.uint8),
        "value_dtype": torch.float32,
    }
    Direct(compiled).topk_encode(**{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"delta": torch.ones(99)}, "delta has 99 elements; 100 are needed"),
        ({"delta": torch.ones(200)[::2]}, "delta: a contiguous tensor"),
        ({"delta": torch.ones(100).half()}, "float32 or float64 is needed, not Half"),
        ({"payload": torch.empty(59, dtype=torch.uint8)}, "payload has 59 elements; 60 are needed"),
        ({"payload": torch.empty(60, dtype=torch.int8)}, "payload is Char"),
        ({"value_dtype": torch.float64}, "value_dtype"),
        ({"value_dtype": torch.float16}, "payload has 60 elements; 40 are needed"),
        ({"x": torch.ones(100)}, "x and points"),
        ({"x": torch.ones(99), "points": [torch.ones(100)]}, "x has 99 elements"),
        ({"x": torch.ones(100), "points": [torch.ones(99)]}, "points have 99 elements"),
        ({"x": torch.ones(100), "points": [torch.ones(50), torch.ones(50)]}, "within one piece"),
        ({"payloads": [torch.zeros(59, dtype=torch.uint8)]}, "payloads has 59 elements"),
        ({"runs": torch.tensor([[0, 100, 1, 0]])}, "kept=0"),
        ({"runs": torch.tensor([[0, 100, 1, 101]])}, "runs"),
        ({"runs": torch.tensor([[1, 100, 1, 10]])}, "runs"),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], message: str) -> None:
    encode()
    with pytest.raises(ValueError, match=message):
        encode(**changed)


def test_malformed_payloads() -> None:
    """Nothing beyond the memory is written, wherever the bytes point; kernels and twins refuse alike."""
    refuse_alike(300, ("", "twins"))


def refuse_alike(trials: int, versions: Sequence[str]) -> None:
    size, compressor = 3 * PAGE, TopKCompressor(1e-4)
    blocks, kept = Blocks.cut([size], None, torch.float32), TopKCompressor(1e-4).kept(size)
    payload = coded(compressor, blocks, normal(size, torch.float32))[0].clone()
    memory = torch.zeros(size + 2 * PAGE)
    out = BlockedTensor(memory[PAGE:-PAGE], blocks)
    offsets = 12 + 4 * kept
    generator, refused = torch.Generator().manual_seed(0), 0
    for trial in range(trials):
        broken = payload.clone()
        first, length = (0, 12) if trial % 2 else (offsets, 2 * kept)
        place = first + int(torch.randint(length, (), generator=generator))
        broken[place] = torch.randint(256, (), generator=generator)
        found = []
        for requested in versions:
            with kernels.only(requested):
                try:
                    compressor.decode_add(broken, out, 1.0)
                    found.append("")
                except ValueError as error:
                    found.append(str(error))
        assert bool(found[0]) == bool(found[1])
        assert not found[0] or "payload" in found[0]
        refused += bool(found[0])
    assert trials / 6 < refused < trials
    assert not memory[:PAGE].any()
    assert not memory[-PAGE:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value_dtype", VALUES[1:], ids=str)
def test_every_number_of_16_bits(value_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Each that there is, what lies halfway and just beside, and what is beyond the range."""
    every = torch.arange(1 << 16).to(torch.int16).view(value_dtype).float()
    finite = every[every.isfinite()].sort().values
    halfway = (finite[1:].double() + finite[:-1].double()).div(2).float()
    beside = [torch.nextafter(halfway, torch.full_like(halfway, end)) for end in (-torch.inf, torch.inf)]
    beyond = torch.tensor([torch.finfo(value_dtype).max * 1.001, torch.finfo(torch.float32).max, 1e-45])
    values = torch.cat([finite, -finite, halfway, *beside, beyond, -beyond]).to(dtype)
    compressor, blocks = TopKCompressor(1, value_dtype), Blocks.cut([values.numel()], None, dtype)
    assert same(coded(compressor, blocks, values), by_twins(compressor, blocks, values))
