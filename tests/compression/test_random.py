"""Compressors that draw random numbers: from what all workers draw alike, or refused, or found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import hvd_saef
from hvd_saef.compression import BlockedTensor, Blocks, Compressor, Draws, Run
from hvd_saef.compression.draws import seed_of
from tests.workers import NO_MODEL, bits, everything, saved, together
from tests.workers import Run as Training

pytestmark = pytest.mark.filterwarnings(NO_MODEL)


@dataclass(frozen=True)
class RandomK(Compressor):
    """Half of each block's entries (but one at least), the same on all workers: no indices travel."""

    @staticmethod
    def kept(size: int) -> int:
        """How many of a block's entries."""
        return (size + 1) // 2

    def payload_bytes(self, layout: Blocks) -> int:
        """A number for each that is kept."""
        return sum(run.count * self.kept(run.size) for run in layout.runs) * layout.dtype.itemsize

    def chosen(self, blocked: BlockedTensor, run: Run) -> Tensor:
        """Which of each block's."""
        return blocked.uniform(run).argsort(dim=1, stable=True)[:, : self.kept(run.size)]

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """Take them out."""
        sent = [delta.flat[:0]]
        for run, rows in delta.rows():
            chosen = self.chosen(delta, run)
            sent.append(rows.gather(1, chosen).view(-1))
            rows.scatter_(1, chosen, 0.0)
        payload.copy_(torch.cat(sent).view(torch.uint8))

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """Put them back where all workers took them."""
        values = payload.clone().view(out.blocks.dtype) * weight
        for run, rows in out.rows():
            numel = run.count * self.kept(run.size)
            rows.scatter_add_(1, self.chosen(out, run), values[:numel].view(run.count, -1))
            values = values[numel:]


@dataclass(frozen=True)
class Rounding(Compressor):
    """A sign and a scale as large as the largest magnitude, or 0, so that the mean is right."""

    def payload_bytes(self, layout: Blocks) -> int:
        """A scale a block and a byte an element."""
        return layout.count * layout.dtype.itemsize + layout.numel

    def draw(self, delta: BlockedTensor, run: Run) -> Tensor:
        """What decides."""
        return delta.uniform(run, own=True)

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """Round each to one of two."""
        scales, signs = [delta.flat[:0]], [payload[:0].view(torch.int8)]
        for run, rows in delta.rows():
            scale = rows.abs().amax(1, keepdim=True)
            sign = rows.sign() * (self.draw(delta, run) * scale < rows.abs())
            rows.sub_(sign * scale)
            scales.append(scale.view(-1))
            signs.append(sign.to(torch.int8).view(-1))
        payload.copy_(torch.cat([torch.cat(scales).view(torch.uint8), torch.cat(signs).view(torch.uint8)]))

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """The signs times their scales."""
        scales, signs = payload.split([out.blocks.count * out.blocks.dtype.itemsize, out.blocks.numel])
        numbers, place = scales.clone().view(out.blocks.dtype) * weight, 0
        for run, rows in out.rows():
            column = numbers[place : place + run.count].unsqueeze(1)
            place += run.count
            rows.add_(column * signs[run.start : run.stop].view(torch.int8).view(run.count, run.size))


@dataclass(frozen=True)
class Careless(Rounding):
    """Draws from torch's own generator, and does not say so."""

    def draw(self, delta: BlockedTensor, run: Run) -> Tensor:
        """What decides."""
        return torch.rand(run.count, run.size, dtype=delta.blocks.dtype)


@dataclass(frozen=True)
class Honest(Careless):
    """Says so."""

    deterministic: ClassVar[bool] = False


class Counting(Rounding):
    """Makes something else of the same input every time that it is called."""

    calls: list[None]

    def __init__(self) -> None:
        object.__setattr__(self, "calls", [])

    def draw(self, delta: BlockedTensor, run: Run) -> Tensor:
        """What decides."""
        self.calls.append(None)
        return torch.full((run.count, run.size), 1 / len(self.calls))


def trained(
    compression: Compressor, workers: int = 3, ranks: int = 1, **options: Any
) -> list[dict[str, bytes]]:
    """The parameters at x of each rank after some rounds."""
    return together(
        workers, lambda rank: bits(Training(rank, compression=compression, **options).step(6).x()), ranks
    )


@pytest.mark.parametrize("compression", [RandomK(), Rounding()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(
    "options",
    [
        {"server": "replicated"},
        {"server": "sharded", "block_size": 5},
        {"double_compression": False},
        {"server_step_ahead": 1.0, "local_steps": 2},
        {"overlap": True},
    ],
    ids=str,
)
def test_x_is_the_same_everywhere(compression: Compressor, options: dict[str, Any]) -> None:
    first, *others = trained(compression, check_consensus_every=1, **options)
    assert all(other == first for other in others)
    assert trained(compression, **options)[0] == first  # and in another run


@pytest.mark.parametrize("compression", [RandomK(), Rounding()], ids=lambda c: type(c).__name__)
def test_both_servers_have_the_same_bits(compression: Compressor) -> None:
    replicated = trained(compression, server="replicated", block_size=5)
    assert trained(compression, server="sharded", block_size=5) == replicated


def test_ranks_of_one_worker_draw_alike() -> None:
    first, *others = trained(Rounding(), 2, ranks=2, worker="node", check_consensus_every=1)
    assert all(other == first for other in others)


def test_a_resumed_run_draws_what_it_would_have_drawn() -> None:
    def fn(rank: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
        whole = Training(rank, compression=Rounding()).step(4)
        state = saved(whole.optimizer.state_dict())
        again = Training(rank, compression=Rounding())
        again.optimizer.load_state_dict(state)
        again.taken = whole.taken
        return everything(whole.step(3)), everything(again.step(3))

    assert all(whole == again for whole, again in together(2, fn))


def test_what_draws_by_itself_is_found() -> None:
    for compression in (Careless(), Counting()):
        with pytest.raises(ValueError, match="encode made two different things of the same input"):
            trained(compression)


WHERE: list[tuple[dict[str, Any], int, str]] = [
    ({"server": "replicated"}, 1, "every worker encodes the server's answer"),
    ({"server_step_ahead": 0.5}, 1, "every worker encodes the server's answer"),
    ({"worker": "node", "double_compression": False}, 2, "all ranks of a worker encode its error"),
]


@pytest.mark.parametrize(("options", "ranks", "words"), WHERE, ids=str)
def test_what_says_so_is_refused_where_several_encode(
    options: dict[str, Any], ranks: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        trained(Honest(), 2, ranks, **options)
    trained(Rounding(), 2, ranks, **options)  # the counter-test


@pytest.mark.parametrize("options", [{"server": "sharded"}, {"double_compression": False}], ids=str)
def test_what_says_so_trains_where_one_encodes(options: dict[str, Any]) -> None:
    first, *others = trained(Honest(), check_consensus_every=1, **options)
    assert all(other == first for other in others)


def test_what_says_so_is_not_measured() -> None:
    def fn(compression: Compressor) -> Callable[[int], None]:
        def monitor(rank: int) -> None:
            run = Training(rank, compression=compression, double_compression=False)
            hvd_saef.diagnostics.Monitor(run.optimizer, every=1)
            run.step(2)

        return monitor

    with pytest.raises(ValueError, match="deterministic = False: what is measured"):
        together(2, fn(Honest()))
    together(2, fn(Rounding()))


def test_what_a_monitor_measures_is_what_is_sent() -> None:
    def fn(rank: int) -> tuple[float, float]:
        run = Training(rank, compression=Rounding(), double_compression=False)
        monitor = hvd_saef.diagnostics.Monitor(run.optimizer, every=1)
        run.step()  # in the first round Δ is the update alone
        measured = monitor.means()
        return (1 - measured["delta"]) * measured["update"], run.optimizer.stats()["error_norm"] ** 2

    ((lost, kept),) = together(1, fn)
    assert lost == pytest.approx(kept, rel=1e-5)
    assert kept > 0


# -- the numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_do_not_depend_on_how_a_bucket_is_cut(dtype: torch.dtype) -> None:
    blocks = Blocks.cut([7, 20, 9], 5, dtype)
    whole = BlockedTensor(torch.zeros(36, dtype=dtype), blocks, Draws.of(3, 1, worker=2))
    drawn = torch.cat([whole.uniform(run).view(-1) for run, _ in whole.rows()])
    cut = blocks.nearest_boundary(17)
    pieces = []
    for start, stop in ((0, cut), (cut, 36)):
        part = BlockedTensor(
            torch.zeros(stop - start, dtype=dtype), blocks.between(start, stop), Draws.of(3, 1, 2, start)
        )
        pieces += [part.uniform(run).view(-1) for run, _ in part.rows()]
    assert torch.equal(torch.cat(pieces), drawn)


def test_draws_are_uniform_and_differ_by_what_they_are_for() -> None:
    numel = 100_000
    blocks = Blocks.cut([numel], None, torch.float64)

    def draw(own: bool = False, **place: Any) -> Tensor:
        place = {"rounds": 4, "bucket": 2, "worker": 1} | place
        blocked = BlockedTensor(torch.zeros(numel, dtype=torch.float64), blocks, Draws.of(**place))
        return blocked.uniform(blocks.runs[0], own).view(-1)

    drawn = draw()
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    # 10 cells of 10,000 expected, whose standard deviation is 95; numbers side by side are not alike
    assert (torch.histc(drawn, 10, 0, 1) - numel / 10).abs().max() < 6 * 95
    centred = drawn - drawn.mean()
    assert abs(float((centred[1:] * centred[:-1]).mean() / centred.square().mean())) < 6 / numel**0.5
    assert torch.equal(drawn, draw(worker=0))
    assert torch.equal(drawn, draw(worker=None))
    several = [
        drawn,
        draw(rounds=5),
        draw(bucket=3),
        draw(True),
        draw(True, worker=0),
        draw(True, worker=None),
    ]
    for i, one in enumerate(several):
        for other in several[:i]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 6 / numel**0.5


def test_seeds_are_known_numbers() -> None:
    """SplitMix64's first outputs for seed 0, as its author's code gives them."""
    assert seed_of(0) == 0xE220A8397B1DCDAF
    assert seed_of(seed_of()) == seed_of(0)
    float64 = Draws(0, 0).uniform(1, 1, torch.float64, torch.device("cpu"), own=False)
    assert float(float64) == (0xE220A8397B1DCDAF >> 11) * 2.0**-53
