"""The Compressor interface: bytes, the L1 sum, the Horovod pair, compressors of one's own, wrong ratios."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hvd_saef import Compression, Compressor
from hvd_saef.compression import BlockedTensor, Blocks, state_dtype
from tests.codes import COMPRESSORS, RATIOS, Bucket, bucket_of, code, topk_bytes, tree
from tests.kernels.slow import twin_sums
from tests.oracle import Setup
from tests.problems import schedule, start_point, worst
from tests.rounds import moves, watch
from tests.workers import NO_MODEL, Run, caught, together

pytestmark = pytest.mark.both_arithmetics

# -- bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("block_size", "lengths"),
    [(None, [35, 3, 1]), (17, [17, 17, 1, 3, 1]), (1, [1] * 39), (1000, [35, 3, 1]), (9, [9, 9, 9, 8, 3, 1])],
)
def test_payload_bytes(dtype: torch.dtype, block_size: int | None, lengths: list[int]) -> None:
    layout, number = Blocks.cut([35, 0, 3, 1], block_size, dtype), dtype.itemsize
    assert Compression.sign.payload_bytes(layout) == sum(number + math.ceil(n / 8) for n in lengths)
    for ratio in RATIOS:
        for value_dtype, width in ((None, number), (torch.float16, 2), (torch.bfloat16, 2)):
            expected = sum(topk_bytes(ratio, n, width) for n in lengths)
            assert Compression.topk(ratio, value_dtype).payload_bytes(layout) == expected
    assert Compression.none.payload_bytes(layout) == 39 * number
    assert Compression.fp16.payload_bytes(layout) == 39 * 2


def test_payload_bytes_of_pages() -> None:
    """Whole pages, one element more, and a block with more elements than int32 counts."""
    for size, expected in ((65536, 656 * 6), (65537, 656 * 6 + 8), (2**32 + 1, 42949673 * 6 + 65537 * 4)):
        assert Compression.topk(0.01).payload_bytes(Blocks.cut([size], None, torch.float32)) == expected
    assert Compression.topk(1).payload_bytes(Blocks.cut([2**32], None, torch.float32)) == 2**34


def test_the_wire_by_hand() -> None:
    """Two blocks of Sign (9 and 2 elements), three of Top-K (4, 2 and 1); little-endian."""
    signs = bucket_of(-1, 1, 1, 1, 1, 1, 1, 1, -1, 0.0, -0.0, block_size=9)
    assert code(Compression.sign, signs).payload.hex() == "0000803f" + "00000000" + "0101" + "02"
    ties = Bucket(np.array([1, -3, 3, 3, -0.0, 0.0, 2], dtype=np.float32), [6, 1], 4)
    values, offsets = "000040c0" + "00004040" + "00000080" + "00000040", "0100" + "0200" + "0000"
    assert code(Compression.topk(0.5), ties).payload.hex() == values + offsets
    half = "00c2" + "0042" + "0080" + "0040"
    assert code(Compression.topk(0.5, torch.float16), ties).payload.hex() == half + offsets
    brain = "40c0" + "4040" + "0080" + "0040"
    assert code(Compression.topk(0.5, torch.bfloat16), ties).payload.hex() == brain + offsets


# -- the L1 sum -------------------------------------------------------------------------------------


def spread(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Numbers of many magnitudes: others are added in float64 without rounding, in whatever order."""
    generator = torch.Generator().manual_seed(columns)
    return torch.randn(rows, columns, generator=generator, dtype=dtype) * torch.exp(
        50 * torch.rand(rows, columns, generator=generator, dtype=dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l1_sums_follow_the_tree(dtype: torch.dtype) -> None:
    naive = 0
    for columns in [*range(1, 71), 255, 256, 257, 1000, 4097, 65551]:
        rows = spread(3, columns, dtype)
        sums = twin_sums(rows).tolist()
        assert sums == [tree(row) for row in rows.tolist()]
        assert sums == [float(twin_sums(row[None])) for row in rows]
        naive += [sum(map(abs, row)) for row in rows.tolist()] != sums
    assert naive > 30  # the counter-test: another order of summation has other bits


def test_l1_sums_do_not_depend_on_threads() -> None:
    rows = spread(2, (1 << 18) + 5, torch.float32)
    before, sums = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            sums.append(twin_sums(rows).tolist())
    finally:
        torch.set_num_threads(before)
    assert sums[0] == sums[1] == sums[2] == [tree(row) for row in rows.tolist()]


# -- the Horovod pair -------------------------------------------------------------------------------


def images(dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of several shapes and strides."""
    whole = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    return {
        "contiguous": whole,
        "transposed": whole[0, 0].t(),
        "strided": whole[:, 1, ::2, 1:5],
        "channels_last": whole.to(memory_format=torch.channels_last),
        "0-dim": whole[0, 0, 0, 0],
        "empty": whole[:0],
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: c.description.split(".")[-1])
def test_apply_is_the_dense_c(compressor: Compressor, dtype: torch.dtype) -> None:
    """The tensor is one block, in logical order; C is taken in float32 or wider and rounded at the end."""
    for tensor in images(dtype).values():
        before, version = tensor.clone(), tensor._version
        wide = tensor.contiguous().view(-1).to(state_dtype(dtype), copy=True)
        blocks = Blocks.cut([wide.numel()], None, wide.dtype)
        payload = torch.empty(compressor.payload_bytes(blocks), dtype=torch.uint8)
        compressor.encode(BlockedTensor(wide, blocks), payload)
        compressor.decode_add(payload, BlockedTensor(wide.zero_(), blocks), 1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sent, context = compressor.compress(tensor)
        for dense in (compressor.apply(tensor), compressor.decompress(sent, context)):
            assert dense.dtype == dtype
            assert dense.shape == tensor.shape
            assert torch.equal(dense, wide.to(dtype).view(tensor.shape))
        assert torch.equal(tensor, before)
        assert tensor._version == version


def test_apply_by_hand() -> None:
    tensor = torch.tensor([[4.0, -1.0], [0.0, -3.0]]).t()
    assert Compression.sign.apply(tensor).tolist() == [[2.0, 2.0], [-2.0, -2.0]]
    assert Compression.topk(0.5).apply(tensor).tolist() == [[4.0, 0.0], [0.0, -3.0]]
    assert Compression.fp16.apply(tensor / 3).tolist() == (tensor / 3).half().float().tolist()


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=lambda c: c.description.split(".")[-1])
def test_integers_pass_through(compressor: Compressor) -> None:
    tensor = torch.arange(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sent, context = compressor.compress(tensor)
    assert compressor.decompress(sent, context).tolist() == [0, 1, 2, 3, 4]
    assert sent.dtype == torch.int64


def test_only_what_saves_nothing_warns() -> None:
    for compressor in (Compression.sign, Compression.topk(0.1)):
        with pytest.warns(UserWarning, match=r"no byte is saved.*hvd_saef\.DistributedOptimizer"):
            compressor.compress(torch.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Compression.none.compress(torch.ones(3))
        sent, _ = Compression.fp16.compress(torch.ones(3))
    assert sent.tolist() == [1, 1, 1]


# -- a compressor of one's own ----------------------------------------------------------------------


@dataclass(frozen=True)
class First(Compressor):
    """Sends the first element of each block times `gain`, after a byte that means nothing."""

    gain: float = 1.0
    forgetful: bool = False

    def payload_bytes(self, layout: Blocks) -> int:
        """One byte, and one number a block."""
        return 1 + layout.count * layout.dtype.itemsize

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """Take the firsts out."""
        firsts = [self.gain * rows[:, 0] for _, rows in delta.rows()]
        for (_, rows), first in zip(delta.rows(), firsts, strict=True):
            rows[:, 0] -= 0 if self.forgetful else first
        payload[1:] = torch.cat([*firsts, delta.flat[:0]]).view(torch.uint8)

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """Put them back."""
        firsts, start = payload[1:].clone().view(out.blocks.dtype), 0
        for run, rows in out.rows():
            rows[:, 0] += weight * firsts[start : start + run.count]
            start += run.count


def lost(compressor: Compressor, server: str, block_size: int | None) -> float:
    """How far the auxiliary point is from where the updates bring it, in the worst round."""
    setup = Setup(
        workers=3, compressor="none", averaging_period=3, block_size=block_size, optimizer="sgd", lr=schedule
    )
    rounds = watch(setup, compression=compressor, server=server)
    assert all(worst(outcome.x, r.after[0].x) == 0 for r in rounds for outcome in r.after)
    assert worst(rounds[-1].after[0].x, start_point()) > 0
    return max(worst(after, expected) for after, expected in moves(start_point(), rounds))


@pytest.mark.filterwarnings("ignore:parameters are stepped ahead")
@pytest.mark.parametrize("server", ["replicated", "sharded"])
@pytest.mark.parametrize("block_size", [None, 4])
def test_ones_own_compressor_loses_nothing(server: str, block_size: int | None) -> None:
    assert lost(First(), server, block_size) < 1e-12
    assert lost(First(gain=0.25), server, block_size) < 1e-12
    assert lost(First(forgetful=True), server, block_size) > 1e-3  # the counter-test


@dataclass(frozen=True)
class Viewing(Compressor):
    """Sends each block's mean magnitude and a byte; reads and writes numbers where they lie."""

    def payload_bytes(self, layout: Blocks) -> int:
        """One number and one byte a block."""
        return layout.count * (layout.dtype.itemsize + 1)

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """Through a view."""
        numbers = payload[: delta.blocks.count * delta.blocks.dtype.itemsize].view(delta.blocks.dtype)
        numbers.copy_(torch.cat([rows.abs().mean(1) for _, rows in delta.rows()] + [delta.flat[:0]]))

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """Through a view."""
        numbers = payload[: out.blocks.count * out.blocks.dtype.itemsize].view(out.blocks.dtype)
        out.flat.add_(numbers.sum() * weight)


@pytest.mark.filterwarnings("ignore:parameters are stepped ahead")
@pytest.mark.parametrize("server", ["replicated", "sharded"])
def test_payloads_are_aligned(server: str) -> None:
    """A compressor that works with one server works with the other, wherever its piece of bytes begins."""
    setup = Setup(workers=3, compressor="none", block_size=4, optimizer="sgd", lr=schedule)
    rounds = watch(setup, 2, compression=Viewing(), server=server)
    assert worst(rounds[-1].after[0].x, start_point()) > 0


def test_descriptions_tell_compressors_apart() -> None:
    every = [*COMPRESSORS[:-3], Compression.none, Compression.fp16, First(), First(gain=0.5)]
    assert len({compressor.description for compressor in every}) == len(every)
    assert First(gain=0.5).description == First(gain=0.5).description


# -- wrong ratios -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.0001, 10, math.nan, math.inf, -math.inf])
def test_ratios_out_of_range(ratio: float) -> None:
    with pytest.raises(ValueError, match="ratio") as raised:
        Compression.topk(ratio)
    assert f"ratio={ratio!r}" in str(raised.value)
    assert "above 0 and up to 1" in str(raised.value)


@pytest.mark.parametrize("ratio", [True, "0.1", None, [0.1], torch.tensor(0.1), 0.1j])
def test_ratios_of_the_wrong_type(ratio: Any) -> None:
    with pytest.raises(TypeError, match="ratio") as raised:
        Compression.topk(ratio)
    assert f"ratio={ratio!r}" in str(raised.value)
    assert "above 0 and up to 1" in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16, torch.complex32])
def test_value_dtypes_that_are_not_allowed(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="value_dtype") as raised:
        Compression.topk(0.1, dtype)
    assert f"value_dtype={dtype}" in str(raised.value)
    assert "torch.float16 and torch.bfloat16 are allowed" in str(raised.value)


@pytest.mark.parametrize("dtype", ["float16", 16, np.float16, torch.ones(1)])
def test_value_dtypes_of_the_wrong_type(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"value_dtype=.*torch\.float16 and torch\.bfloat16 are allowed"):
        Compression.topk(0.1, dtype)


@pytest.mark.filterwarnings(NO_MODEL)
def test_dense_below() -> None:
    """Small blocks have no error; a compressor that cannot do it is refused."""

    def work(rank: int, dense_below: int) -> list[float]:
        run = Run(rank, dense_below=dense_below).step(3)
        return [float(error.abs().max()) for error in run.ours("errors").values()]

    sizes = [array.size for array in start_point()]
    middle = sorted(sizes)[len(sizes) // 2]
    for largest in together(3, lambda rank: work(rank, middle)):
        assert [error == 0 for error in largest] == [size < middle or size == 1 for size in sizes]
    assert all(error == 0 for error in together(2, lambda rank: work(rank, max(sizes) + 1))[0])
    refused = caught(1, lambda rank: Run(rank, dense_below=5, compression=First()))
    assert "dense_below=5: First" in str(refused[0])
