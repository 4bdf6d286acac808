"""How parameters are cut into blocks, buckets and parts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hvd_saef import Compression, Compressor, run_workers
from hvd_saef.compression import BlockedTensor, Blocks, Run
from hvd_saef.memory.layout import Bucket, Layout, build_layout
from hvd_saef.settings import Settings
from tests.memory.test_oracle import distance
from tests.oracle import Array, Setup, run
from tests.problems import STEPS, curved_valley, run_library, schedule, start_point, worst

pytestmark = [
    pytest.mark.filterwarnings("ignore:parameters are stepped ahead"),
    pytest.mark.filterwarnings("ignore:the largest block"),
]

tensor_sizes = st.lists(st.integers(0, 60), max_size=6)
block_sizes = st.none() | st.integers(1, 70)


def lengths(blocks: Blocks) -> list[int]:
    """Of each block."""
    return [run.size for run in blocks.runs for _ in range(run.count)]


def boundaries(blocks: Blocks) -> list[int]:
    """Where blocks begin and end."""
    return [0, *itertools.accumulate(lengths(blocks))]


def bucket_of(sizes: list[int], block_size: int | None) -> Bucket:
    blocks = Blocks.cut(sizes, block_size, torch.float32)
    return Bucket(0, (), Compression.sign, blocks, torch.device("cpu"))


@settings(deadline=None)
@given(tensor_sizes, block_sizes)
def test_cut(sizes: list[int], block_size: int | None) -> None:
    """Each tensor into blocks of block_size and the rest; runs one after the other, without gaps."""
    blocks = Blocks.cut(sizes, block_size, torch.float64)
    expected: list[int] = []
    for size in sizes:
        whole = block_size or max(1, size)
        expected += [whole] * (size // whole) + [size % whole] * (size % whole > 0)
    assert lengths(blocks) == expected
    assert blocks.dtype == torch.float64
    assert (blocks.numel, blocks.count) == (sum(sizes), len(expected))
    assert blocks.largest == max(expected, default=0)
    starts = [0, *(run.stop for run in blocks.runs)]
    assert [run.start for run in blocks.runs] == starts[:-1]
    assert starts[-1] == sum(sizes)


@settings(deadline=None)
@given(tensor_sizes, block_sizes)
def test_rows_are_views_of_the_blocks(sizes: list[int], block_size: int | None) -> None:
    blocks = Blocks.cut(sizes, block_size, torch.float32)
    flat = torch.arange(float(blocks.numel))
    rows = [row.tolist() for _, matrix in BlockedTensor(flat, blocks).rows() for row in matrix]
    edges = boundaries(blocks)
    assert rows == [list(map(float, range(*edge))) for edge in itertools.pairwise(edges)]
    for _, matrix in BlockedTensor(flat, blocks).rows():
        matrix.zero_()
    assert not flat.any()


@settings(deadline=None)
@given(tensor_sizes, block_sizes, st.data())
def test_nearest_boundary(sizes: list[int], block_size: int | None, data: st.DataObject) -> None:
    blocks = Blocks.cut(sizes, block_size, torch.float32)
    element = data.draw(st.integers(0, blocks.numel))
    nearest = min(boundaries(blocks), key=lambda edge: (abs(edge - element), edge))
    assert blocks.nearest_boundary(element) == nearest


@settings(deadline=None)
@given(tensor_sizes, block_sizes, st.data())
def test_between(sizes: list[int], block_size: int | None, data: st.DataObject) -> None:
    blocks = Blocks.cut(sizes, block_size, torch.float32)
    edges = boundaries(blocks)
    first, last = sorted(data.draw(st.tuples(*2 * [st.integers(0, len(edges) - 1)])))
    piece = blocks.between(edges[first], edges[last])
    assert lengths(piece) == lengths(blocks)[first:last]
    assert [run.start for run in piece.runs] == [0, *(run.stop for run in piece.runs)][:-1]


def check_parts(bucket: Bucket, number: int) -> None:
    """Parts cover the bucket in order; each begins at the block boundary nearest to its even share."""
    parts, edges = bucket.parts(number), boundaries(bucket.blocks)
    assert len(parts) == number
    assert (parts[0].start, parts[-1].stop) == (0, bucket.numel)
    assert [part.stop for part in parts[:-1]] == [part.start for part in parts[1:]]
    assert [n for part in parts for n in lengths(part.blocks)] == lengths(bucket.blocks)
    for j, part in enumerate(parts):
        assert 0 <= part.start <= part.stop
        assert part.blocks.numel == part.stop - part.start
        even = j * bucket.numel // number
        assert part.start == min(edges, key=lambda edge: (abs(edge - even), edge))


@settings(deadline=None)
@given(tensor_sizes, block_sizes, st.integers(1, 9))
def test_parts(sizes: list[int], block_size: int | None, number: int) -> None:
    check_parts(bucket_of(sizes, block_size), number)


def test_parts_are_even_where_blocks_allow() -> None:
    assert [part.stop - part.start for part in bucket_of([64], 1).parts(4)] == [16, 16, 16, 16]
    assert [part.stop - part.start for part in bucket_of([100], None).parts(4)] == [0, 0, 100, 0]


@pytest.mark.parametrize("fault", ["always down", "off the boundary"])
def test_wrong_cuts_are_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter-test."""

    def wrong(self: Blocks, element: int) -> int:
        edges = boundaries(self)
        return max(edge for edge in edges if edge <= element) if fault == "always down" else element

    bucket = bucket_of([10, 13, 8], 6)
    check_parts(bucket, 3)
    monkeypatch.setattr(Blocks, "nearest_boundary", wrong)
    with pytest.raises(AssertionError):
        check_parts(bucket, 3)


# -- buckets ----------------------------------------------------------------------------------------


def layout_of(parameters: list[nn.Parameter], choose: Any = None, **options: Any) -> Layout:
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    names: dict[Tensor, str] = {p: f"p{i}" for i, p in enumerate(parameters)}
    return build_layout(groups, names, choose or (lambda *_: Compression.sign), Settings(**options))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))),
    st.integers(1, 600),
    block_sizes,
)
def test_buckets(shapes: list[tuple[int, torch.dtype]], bucket_bytes: int, block_size: int | None) -> None:
    """One compressor and state dtype each, no larger than asked unless for one parameter, none forgotten."""

    def choose(name: str, parameter: Tensor) -> Compressor:
        return Compression.none if parameter.numel() % 3 == 0 else Compression.sign

    parameters = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in shapes]
    layout = layout_of(parameters, choose, bucket_bytes=bucket_bytes, block_size=block_size)
    assert sorted(int(slot.name[1:]) for slot in layout.slots) == list(range(len(parameters)))
    for place, bucket in enumerate(layout.buckets):
        assert bucket.index == place
        assert (
            bucket.numel * bucket.dtype.itemsize <= bucket_bytes
            or sum(p.numel() > 0 for p in bucket.parameters) == 1
        )
        assert bucket.blocks == Blocks.cut([p.numel() for p in bucket.parameters], block_size, bucket.dtype)
        order = [int(slot.name[1:]) for slot in bucket.slots]
        assert order == sorted(order)
        assert [slot.start for slot in bucket.slots] == [0, *(slot.stop for slot in bucket.slots)][:-1]
        for slot in bucket.slots:
            assert slot.parameter is parameters[int(slot.name[1:])]
            assert choose(slot.name, slot.parameter) == bucket.compressor
            assert bucket.dtype == (torch.float64 if slot.parameter.dtype == torch.float64 else torch.float32)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 4), max_size=4).filter(lambda shape: math.prod(shape) < 200),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_slots_are_in_memory_order(shape: list[int], random: Any, gaps: bool) -> None:
    """A view of flat memory in the parameter's shape: memory order if it is dense, else logical order."""
    axes = random.sample(range(len(shape)), len(shape))
    whole = torch.arange(float(math.prod(shape))).view(shape)
    if gaps and shape:
        whole = torch.stack([whole, whole], dim=-1)[..., 0]  # every other number of a larger memory
    parameter = nn.Parameter(whole.permute(axes))
    layout = layout_of([nn.Parameter(torch.zeros(3)), parameter])
    slot = layout.slots[1]
    flat = torch.zeros(3 + parameter.numel())
    slot.view(flat).copy_(parameter.detach())
    dense = parameter.numel() > 0 and not (gaps and shape and parameter.numel() > 1)
    expected = whole if dense else parameter.detach()
    assert slot.view(flat).shape == parameter.shape
    assert flat[3:].tolist() == expected.reshape(-1).tolist()


def test_the_description_tells_layouts_apart() -> None:
    """What the agreement between workers compares: shapes, strides, dtypes, groups, compressors, settings."""
    base = [nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(2))]
    layouts = [
        layout_of(base),
        layout_of([nn.Parameter(torch.zeros(4, 4).t()), base[1]]),
        layout_of([nn.Parameter(torch.zeros(2, 8)), base[1]]),
        layout_of([nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16)), base[1]]),
        layout_of(base, lambda *_: Compression.topk(0.1)),
        layout_of(base, lambda *_: Compression.topk(0.2)),
        layout_of(base, block_size=3),
        layout_of([*base, nn.Parameter(torch.zeros(0))]),
    ]
    assert len({layout.digest for layout in layouts}) == len(layouts)
    assert layout_of([nn.Parameter(torch.ones(4, 4)), base[1]]).digest == layouts[0].digest


def test_the_largest_share_is_of_what_is_compressed() -> None:
    def choose(name: str, parameter: Tensor) -> Compressor:
        return Compression.none if name == "p0" else Compression.sign

    parameters = [nn.Parameter(torch.zeros(n)) for n in (1000, 30, 60, 10)]
    assert layout_of(parameters, choose).largest_share() == (0.6, "p2")
    assert layout_of(parameters, choose, block_size=20).largest_share()[0] == 0.2
    assert layout_of(parameters, lambda *_: Compression.fp16).largest_share() == (0.0, "")
    assert Run(5, 3, 2).stop == 11


# -- trained ----------------------------------------------------------------------------------------


def oracle_distance(setup: Setup, start: list[Array], **options: Any) -> float:
    truth = run(setup, start, curved_valley, STEPS)
    return distance(run_workers(setup.workers, lambda k: run_library(setup, k, start, **options)), truth)


@pytest.mark.parametrize("compressor", ["sign", "topk"])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("block_size", [None, 5])
def test_empty_and_0_dim(compressor: str, bucket_bytes: int, block_size: int | None) -> None:
    start = [np.zeros((0, 3)), *start_point(), np.zeros(0), np.asarray(0.5), np.zeros((2, 0))]
    setup = Setup(3, compressor, block_size=block_size, averaging_period=4, lr=schedule)
    assert oracle_distance(setup, start, bucket_bytes=bucket_bytes) < 1e-10
    assert oracle_distance(setup, [np.zeros((0, 3)), np.zeros(0)], bucket_bytes=bucket_bytes) == 0


def test_the_first_bucket_is_small() -> None:
    """Backward completes it last, so that all wait for its trip; but not one that follows earlier ones."""
    parameters = [nn.Parameter(torch.zeros(25)) for _ in range(20)]  # 100 bytes each
    layout = layout_of(parameters, bucket_bytes=800)
    assert [len(bucket.slots) for bucket in layout.buckets] == [1, 8, 8, 3]
    assert [len(bucket.slots) for bucket in layout_of(parameters[:1], bucket_bytes=800).buckets] == [1]
    more = [nn.Parameter(torch.zeros(25)) for _ in range(3)]
    names: dict[Tensor, str] = {p: f"p{i}" for i, p in enumerate(parameters + more)}
    groups = [{"params": parameters + more}]
    grown = build_layout(groups, names, lambda *_: Compression.sign, Settings(bucket_bytes=800), layout)
    assert [len(bucket.slots) for bucket in grown.buckets] == [1, 8, 8, 3, 3]


def test_compressors_by_parameter() -> None:
    """Biases dense and the rest Top-K: each parameter as the oracle of its compressor has it."""

    def choose(name: str, parameter: Tensor) -> Compressor:
        return Compression.topk(0.1) if parameter.dim() > 1 else Compression.none

    def work(rank: int) -> tuple[list[Array], dict[str, float]]:
        last: list[Any] = []
        run_library(
            setup,
            rank,
            start_point(),
            compression=choose,
            each_step=lambda _, optimizer: last.append(optimizer),
        )
        x = last[-1].state_dict()["hvd_saef"]["x"]
        return [x[f"noname.0.{i}"].numpy() for i in range(len(x))], last[-1].stats()

    setup = Setup(3, "topk", averaging_period=4, optimizer="adamw", lr=schedule)
    dense = dataclasses.replace(setup, compressor="none")
    topk, plain = (run(which, start_point(), curved_valley, STEPS).x for which in (setup, dense))
    expected = [t if t.ndim > 1 else p for t, p in zip(topk, plain, strict=True)]
    for found, stats in run_workers(3, work):
        assert worst(found, expected) < 1e-10
        assert min(worst(found, topk), worst(found, plain)) > 1e-3
        assert min(stats["payload_bytes_sent"], stats["dense_bytes_sent"]) > 0
