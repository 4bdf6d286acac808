"""The kernels on the device against the twins on the CPU, to the bit."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.pieces import Place
from hvd_saef import Compression, Compressor, kernels
from hvd_saef.compression import Blocks, Memory, SignCompressor, TopKCompressor
from hvd_saef.kernels import Stretch
from hvd_saef.memory.algorithm import PlainRows
from tests.gpu.registry import best, check, needs_memory, needs_triton
from tests.kernels.rounds import CPU, NARROW, Copying, Worker, same

SIZES = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 1000, 1023, 1024, 1025, 4095, 4096, 4097, 8191, 8193]
LARGE = [65535, 65536, 65537, 200_001, 3_000_017]
TINY = [[9], [60, 100]]
COMPRESSORS: dict[str, Compressor] = {
    "sign": Compression.sign,
    "sign, small blocks dense": SignCompressor(dense_below=60),
    "Top-K 1 %": TopKCompressor(0.01),
    "Top-K 20 % in bfloat16": TopKCompressor(0.2, torch.bfloat16),
    "Top-K 1 % in float16, small blocks dense": TopKCompressor(0.01, torch.float16, dense_below=60),
}
KINDS: dict[str, tuple[torch.dtype, list[torch.dtype]]] = {
    "float32": (torch.float32, [torch.float32]),
    "parameters of 16 bits": (torch.float32, NARROW),
    "float64": (torch.float64, [torch.float64]),
}
WEIGHTS = [0.7, 0.2]


def parts(place: Place) -> list[list[int]]:
    """The sizes of tensors, part by part of a bucket."""
    return TINY if place.tiny else [SIZES, LARGE]


def differing(found: list[Tensor], expected: list[Tensor]) -> list[int]:
    """Which tensors have other bits, by their numbers."""
    pairs = enumerate(zip(found, expected, strict=True))
    return [number for number, (one, other) in pairs if not same([one], [other])]


def agrees(compressor: Compressor, dtype: torch.dtype, dtypes: list[torch.dtype], place: Place) -> None:
    """A round on the device leaves the bits that it leaves on the CPU: blocks of all sizes, nasty numbers."""
    cases = [(None, False, False, 1.0, 0.0), (4096, True, True, 0.7, 0.4)]
    for block_size, nasty, odd, alpha, beta in cases[place.tiny :]:
        cut = 70 if place.tiny else block_size
        of = partial(
            Worker.of, parts(place), dtypes, dtype, block_size=cut, nasty=nasty, alpha=alpha, beta=beta
        )
        with kernels.only("twins"):
            expected = of(device=CPU).round(Copying(compressor), compressor, WEIGHTS)
        with kernels.only(best(place)):
            rows = compressor.fused(place.device, dtype, False) or Copying(compressor)
            found = of(device=place.device).round(rows, compressor, WEIGHTS, odd)
        assert differing(found, expected) == []


CASES = [
    ("sign", "float32"),
    ("sign", "parameters of 16 bits"),
    ("sign", "float64"),
    ("sign, small blocks dense", "parameters of 16 bits"),
    ("Top-K 1 %", "float32"),
    ("Top-K 1 %", "float64"),
    ("Top-K 20 % in bfloat16", "float32"),
    ("Top-K 1 % in float16, small blocks dense", "parameters of 16 bits"),
]
"""Each is some 15 kernels that Triton compiles first: not all combinations."""
for _compressor, _kind in CASES:
    check("kernels", f"{_compressor}: {_kind}")(partial(agrees, COMPRESSORS[_compressor], *KINDS[_kind]))


@check("kernels")
def a_wrong_bit_is_seen(place: Place) -> None:
    """The counter-check: another α has other bits."""
    with kernels.only(best(place)):
        one, other = (
            Worker.of(TINY, [torch.float32], torch.float32, place.device, alpha=alpha).round(
                PlainRows(Compression.sign), Compression.sign, WEIGHTS
            )
            for alpha in (1.0, 1.0 - 2**-20)
        )
    assert not same(one, other)


@check("kernels")
def the_twins_on_the_device(place: Place) -> None:
    """They serve where there is no Triton."""
    for compressor in COMPRESSORS.values():
        with kernels.only("twins"):
            found, expected = (
                Worker.of(parts(place), [torch.float32], torch.float32, device).round(
                    PlainRows(compressor), compressor, WEIGHTS
                )
                for device in (place.device, CPU)
            )
        assert same(found, expected)


@check("kernels")
def infinities_and_nans(place: Place) -> None:
    """Top-K takes them for the largest, equal to each other."""
    needs_triton(place)
    compressor = TopKCompressor(0.02)
    for size in (40, 100) if place.tiny else (100, 3000, 65537, 200_001):
        values = torch.randn(size, generator=torch.Generator().manual_seed(size))
        values[::40], values[7::90], values[20::60] = torch.inf, -torch.inf, torch.nan
        assert same(
            coded("triton", compressor, values, place.device), coded("twins", compressor, values, CPU)
        )


@check("kernels")
def ties_and_zeros(place: Place) -> None:
    """Of equal magnitudes the lower index is taken, whatever the programs' order."""
    needs_triton(place)
    for size, ratio in itertools.product((40, 100) if place.tiny else (4096, 300_001), (1e-9, 0.3, 1)):
        numbers = torch.randn(size, generator=torch.Generator().manual_seed(size))
        for values in ((numbers * 3).round(), torch.copysign(torch.zeros_like(numbers), numbers)):
            found = coded("triton", TopKCompressor(ratio), values, place.device)
            assert same(found, coded("twins", TopKCompressor(ratio), values, CPU))


def coded(version: str, compressor: TopKCompressor, values: Tensor, device: torch.device) -> list[Tensor]:
    """The payload, what is left of the values, and what the payload adds to ones."""
    blocks = Blocks.cut([values.numel()], None, values.dtype)
    rest, out = values.to(device, copy=True), torch.ones_like(values, device=device)
    payload = torch.empty(compressor.payload_bytes(blocks), dtype=torch.uint8, device=device)
    table = blocks.table(compressor.kept)
    with kernels.only(version):
        chosen = kernels.version_for(device, values.dtype)
    chosen.topk_encode([Stretch(rest, table, payload)], values.dtype)
    chosen.topk_decode([Stretch(out, table, payloads=[payload])], values.dtype, weights=[-0.3])
    chosen.raise_refusals()
    return [payload.cpu(), rest.cpu(), out.cpu()]


@check("kernels")
def more_than_two_gigabytes(place: Place) -> None:
    """A block of more than 2³¹ bytes, against the twins on the same device."""
    needs_triton(place)
    needs_memory(place, 60)
    size = 5000 if place.tiny else (1 << 29) + (1 << 20) + 5
    generator = torch.Generator(place.device).manual_seed(0)
    values = torch.randn(size, generator=generator, device=place.device)
    blocks = Blocks.cut([size], None, torch.float32)
    for compressor in (Compression.sign, TopKCompressor(0.01)):
        left = []
        for version in ("twins", best(place)):
            with kernels.only(version):
                memory = Memory(blocks, values.roll(1), values.clone(), None, [values.roll(2)], 1.0, 0.0)
                bytes_ = compressor.payload_bytes(blocks)
                payload = torch.empty(bytes_, dtype=torch.uint8, device=place.device)
                rows = compressor.fused(place.device, torch.float32, True) or PlainRows(compressor)
                rows.send([memory], [payload])
                rows.receive([memory], [payload], [[payload]], [1.0])
                left.append([payload, memory.e, memory.x])
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*left, strict=True))
        del left


@check("kernels")
def one_number_too_many(place: Place) -> None:
    """The look at numbers, in all dtypes and wherever the number is."""
    size = 33 if place.tiny else 1_000_003
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        with kernels.only(best(place)):
            ones = [torch.ones(shape, dtype=dtype, device=place.device) for shape in ((size,), (6, 4))]
            tensors = [ones[0], ones[1][:, ::2]]
            assert kernels.all_finite(tensors)
            assert kernels.squares_fit(tensors)
            for where in (0, size // 2, size - 1):
                for value in (torch.inf, -torch.inf, torch.nan):
                    tensors[0][where] = value
                    assert not kernels.all_finite(tensors)
                tensors[0][where] = 1
            tensors[1][5, 1] = torch.nan
            assert not kernels.all_finite(tensors)


@check("kernels")
def malformed_payloads(place: Place) -> None:
    """What the twins refuse is refused, and nothing beyond the memory is written."""
    needs_triton(place)
    size, room = (300, 100) if place.tiny else (200_001, 70_000)
    compressor = TopKCompressor(0.1 if place.tiny else 1e-3)
    blocks = Blocks.cut([size], None, torch.float32)
    table = blocks.table(compressor.kept)
    generator, refused, trials = torch.Generator().manual_seed(0), 0, 8 if place.tiny else 200
    payload = coded("triton", compressor, torch.randn(size, generator=generator), place.device)[0]
    for _ in range(trials):
        broken = payload.clone()
        where = int(torch.randint(len(payload), (), generator=generator))
        broken[where] = torch.randint(256, (), generator=generator)
        said = []
        for version, device in (("triton", place.device), ("twins", CPU)):
            memory = torch.zeros(size + 2 * room, device=device)
            with kernels.only(version):
                chosen = kernels.version_for(device, torch.float32)
            try:
                stretch = Stretch(memory[room:-room], table, payloads=[broken.to(device)])
                chosen.topk_decode([stretch], torch.float32, weights=[1.0])
                chosen.raise_refusals()
                said.append("")
            except ValueError as error:
                said.append(str(error))
            assert not memory[:room].any()
            assert not memory[-room:].any()
        assert bool(said[0]) == bool(said[1]), said
        refused += bool(said[0])
    assert 0 < refused < trials
