"""What follows from Algorithm 1 (the table in hvd_saef.memory.algorithm), and what has the same bits."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_saef import Compression, run_workers
from hvd_saef.compression import BlockedTensor, NoneCompressor, SignCompressor
from hvd_saef.transport.communicator import Channel
from hvd_saef.transport.threads import ThreadCommunicator
from tests.oracle import Array, Setup, mean, run
from tests.problems import curved_valley, run_library, same_bits, schedule, start_point, worst
from tests.rounds import Round, moves, watch

pytestmark = [
    pytest.mark.both_arithmetics,
    pytest.mark.filterwarnings("ignore:parameters are stepped ahead"),
    pytest.mark.filterwarnings("ignore:the largest block"),
]
ROUNDING = 1e-12  # numbers are of size 1 and one operation rounds by 1e-16: some thousand fit in
quick = settings(max_examples=40, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def quick_threads() -> Iterator[None]:
    """Let the simulation's threads hand over quickly."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-4)
    yield
    sys.setswitchinterval(before)


def jumpy(step: int) -> float:
    """A learning rate that goes up and down by factors of ten and a hundred."""
    return (0.05, 0.0005, 0.005, 0.05, 0.001)[step % 5]


@dataclass(frozen=True)
class Case:
    setup: Setup
    server: str


@st.composite
def cases(draw: st.DrawFn, /, **fixed: Any) -> Case:
    """Any settings that go together, but for those that are `fixed`."""
    fraction = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)
    feedback, double = draw(st.sampled_from(["saef", "saef", "ef"])), draw(st.booleans())
    ahead = double and feedback == "saef" and draw(st.booleans())
    servers = ["auto", "replicated"] + ["sharded"] * (double and not ahead)
    chosen: dict[str, Any] = {
        "workers": draw(st.integers(1, 4)),
        "compressor": draw(st.sampled_from(["sign", "topk", "none"])),
        "ratio": draw(st.sampled_from([0.01, 0.2, 1.0])),
        "feedback": feedback,
        "step_ahead": draw(fraction) if feedback == "saef" else 1.0,
        "server_step_ahead": draw(fraction) if ahead else 0.0,
        "double_compression": double,
        "averaging_period": draw(st.sampled_from([None, 2, 3, 5])),
        "local_steps": draw(st.integers(1, 3)),
        "warmup_steps": draw(st.sampled_from([0, 0, 1, 3])),
        "block_size": draw(st.sampled_from([None, 1, 5, 17, 1000])),
        "lr": draw(st.sampled_from([schedule, jumpy])),
    }
    return Case(Setup(**(chosen | fixed), optimizer="sgd"), draw(st.sampled_from(servers)))


def lost(rounds: list[Round]) -> float:
    """How far x~ is, in the worst round, from where mean(b - y) brings it."""
    return max(worst(after, expected) for after, expected in moves(start_point(), rounds))


def split(rounds: list[Round]) -> bool:
    """Whether any worker's x ever has other bits than worker 0's."""
    return not all(same_bits(held.x, r.after[0].x) for r in rounds for held in r.after)


def equal(these: list[Round], those: list[Round]) -> bool:
    """Whether x, errors, server errors and parameters have the same bits after every round."""
    return all(
        same_bits(a.server_error, b.server_error)
        and all(
            same_bits([*p.x, *p.errors, *p.parameters], [*q.x, *q.errors, *q.parameters])
            for p, q in zip(a.after, b.after, strict=True)
        )
        for a, b in zip(these, those, strict=True)
    )


# -- the properties ---------------------------------------------------------------------------------


@quick
@given(cases())
def test_nothing_is_lost_and_x_is_one(case: Case) -> None:
    """x~ = x - (s + mean e) moves by mean(b - y), and x has the same bits on all workers."""
    rounds = watch(case.setup, server=case.server)
    assert lost(rounds) < ROUNDING
    assert not split(rounds)


def plain(setup: Setup, steps: int) -> list[Array]:
    """Data-parallel training, uncompressed: H local steps from one point, then the mean of the ends."""
    x, momenta = start_point(), [[np.zeros_like(w) for w in start_point()] for _ in range(setup.workers)]
    ends = [[w.copy() for w in x] for _ in range(setup.workers)]
    for step in range(steps):
        for k, (end, momentum) in enumerate(zip(ends, momenta, strict=True)):
            for i, slope in enumerate(curved_valley(k, step, [w.copy() for w in end])):
                if slope is not None:
                    momentum[i] = setup.momentum * momentum[i] + slope
                    end[i] = end[i] - setup.lr(step) * momentum[i]
        if (step + 1) % setup.local_steps == 0:
            x = [mean(list(of_workers)) for of_workers in zip(*ends, strict=True)]
            ends = [[w.copy() for w in x] for _ in range(setup.workers)]
    return x


def distance_from_plain(case: Case, **options: Any) -> float:
    setup = dataclasses.replace(case.setup, optimizer="sgdm")
    steps = 6 * setup.local_steps
    options |= {"steps": steps, "server": case.server}
    outcomes = run_workers(setup.workers, lambda rank: run_library(setup, rank, start_point(), **options))
    return max(worst(outcome.x, plain(setup, steps)) for outcome in outcomes)


@quick
@given(cases(compressor="none"))
def test_the_identity_gives_plain_training(case: Case) -> None:
    assert distance_from_plain(case) < ROUNDING


@quick
@given(cases(lr=jumpy))
def test_errors_need_no_rescaling(case: Case) -> None:
    """The oracle keeps errors in units of the model and rescales nothing when the learning rate jumps."""
    truth = run(case.setup, start_point(), curved_valley, 8 * case.setup.local_steps)
    rounds = watch(case.setup, server=case.server)
    assert max(worst(held.x, truth.x) for held in rounds[-1].after) < 1e-10
    for r, auxiliary, update in zip(rounds, truth.auxiliary, truth.mean_update, strict=True):
        assert max(worst(r.auxiliary, auxiliary), worst(r.mean_update, update)) < 1e-10


def mismatch(setup: Setup) -> list[float]:
    """After each round, how far the start points of the next are from x~."""
    rounds = watch(setup, server="replicated")
    return [max(worst(held.parameters, r.auxiliary) for held in r.after) for r in rounds]


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("compressor", ["sign", "topk"])
@pytest.mark.parametrize("period", [2, 3])
def test_no_mismatch_after_an_averaging(workers: int, compressor: str, period: int) -> None:
    """At alpha = beta = 1, b = x - mean e - s is x~. At no other time, and for no smaller beta."""
    setup = Setup(
        workers, compressor, averaging_period=period, server_step_ahead=1.0, optimizer="sgd", lr=schedule
    )
    for t, found in enumerate(mismatch(setup), start=1):
        assert found < ROUNDING if (t + 1) % period == 0 else found > 1e-6
    assert min(mismatch(dataclasses.replace(setup, server_step_ahead=0.9))) > 1e-6


# -- the same bits ----------------------------------------------------------------------------------


@quick
@given(cases())
def test_two_runs_have_the_same_bits(case: Case) -> None:
    assert equal(watch(case.setup, 5, server=case.server), watch(case.setup, 5, server=case.server))


PAYLOADS = {"double_compression": True, "server_step_ahead": 0.0, "averaging_period": None, "warmup_steps": 0}


def servers_agree(setup: Setup, **options: Any) -> bool:
    return equal(
        watch(setup, 5, server="replicated", **options), watch(setup, 5, server="sharded", **options)
    )


@pytest.mark.parametrize("compressor", ["sign", "topk"])
@quick
@given(case=cases(**PAYLOADS), bucket_bytes=st.sampled_from([1, 100, 1 << 25]))
def test_replicated_and_sharded_have_the_same_bits(compressor: str, case: Case, bucket_bytes: int) -> None:
    setup = dataclasses.replace(case.setup, compressor=compressor)
    assert servers_agree(setup, bucket_bytes=bucket_bytes)


@quick
@given(cases(), st.sampled_from([1, 80, 300]))
def test_buckets_make_no_bit_of_difference(case: Case, bucket_bytes: int) -> None:
    whole = watch(case.setup, 5, server=case.server)
    assert equal(whole, watch(case.setup, 5, server=case.server, bucket_bytes=bucket_bytes))


# -- counter-tests: what each check catches -----------------------------------------------------------


@dataclass(frozen=True)
class Broken(SignCompressor):
    """Sign with one of three faults."""

    fault: str

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """Forget the error, or scale by what is in other blocks, or by chance."""
        whole = delta.flat.clone()
        super().encode(delta, payload)
        if self.fault == "forgets the error":
            delta.flat.zero_()
            return
        scales = payload[: delta.blocks.count * delta.blocks.dtype.itemsize].clone().view(delta.blocks.dtype)
        scales *= float(torch.rand(())) if self.fault == "random" else float(scales.mean())
        payload[: 8 * len(scales)] = scales.view(torch.uint8)
        sent = torch.zeros_like(whole)
        self.decode_add(payload, BlockedTensor(sent, delta.blocks), 1.0)
        delta.flat.copy_(whole - sent)


class ByChance(Broken):
    """The fault that is refused, unless the compressor says that it has it."""

    deterministic = False


@dataclass(frozen=True)
class Rounded(NoneCompressor):
    """Not the identity, though nothing is lost."""

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """Send a float32's worth, keep the rest."""
        payload.view(delta.flat.dtype).copy_(delta.flat.float())
        delta.flat.sub_(payload.view(delta.flat.dtype))


SIGN = Setup(3, "sign", optimizer="sgd", lr=jumpy, block_size=17)


@pytest.mark.parametrize("server", ["replicated", "sharded"])
def test_a_forgotten_error_is_noticed(server: str) -> None:
    assert lost(watch(SIGN, server=server)) < ROUNDING
    assert lost(watch(SIGN, server=server, compression=Broken("forgets the error"))) > 1e-3


def test_compressors_that_are_not_the_identity_are_noticed() -> None:
    case = Case(dataclasses.replace(SIGN, compressor="none"), "auto")
    assert distance_from_plain(case) < ROUNDING
    assert distance_from_plain(case, compression=Rounded()) > 1e-10
    assert distance_from_plain(case, compression=Compression.sign) > 1e-3


def test_a_rescaled_error_is_noticed() -> None:
    """Errors in units of the gradients would have to follow the learning rate; ours must not."""
    truth = run(SIGN, start_point(), curved_valley, 8)

    def distance(power: float) -> float:
        def rescale(step: int, optimizer: Any) -> None:
            state = optimizer.state_dict()
            for error in state["hvd_saef"]["errors"].values():
                error *= (jumpy(step + 1) / jumpy(step)) ** power
            optimizer.load_state_dict(state)

        outcomes = run_workers(3, lambda k: run_library(SIGN, k, start_point(), steps=8, each_step=rescale))
        return worst(outcomes[0].x, truth.x)

    assert distance(0.0) < 1e-10
    assert distance(1.0) > 1e-3


def test_chance_is_noticed() -> None:
    by_chance = ByChance("random")
    assert not equal(*(watch(SIGN, 3, compression=by_chance, server="sharded") for _ in range(2)))


def test_blocks_that_know_of_others_are_noticed() -> None:
    bad = Broken("reads other blocks")
    assert not servers_agree(SIGN, compression=bad)
    assert not equal(*(watch(SIGN, 3, compression=bad, bucket_bytes=n) for n in (1, 1 << 20)))


def test_means_in_an_order_of_ones_own_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every worker adds up from its own rank on: equal but for the rounding."""
    gather = ThreadCommunicator.allgather

    def from_own_rank_on(
        self: ThreadCommunicator, payload: Tensor, out: list[Tensor], channel: Channel
    ) -> None:
        gather(self, payload, out[self.rank :] + out[: self.rank], channel)

    def mean_that_depends_on_rank(self: ThreadCommunicator, tensor: Tensor, name: str) -> None:
        tensors = self._meetings[Channel.UP].exchange(self.rank, name, tensor.clone())
        tensor.copy_(sum(tensors[self.rank :] + tensors[: self.rank]) / self.size)

    dense = dataclasses.replace(SIGN, compressor="none")
    assert not split([*watch(SIGN, server="replicated"), *watch(dense)])
    monkeypatch.setattr(ThreadCommunicator, "allgather", from_own_rank_on)
    assert split(watch(SIGN, server="replicated"))
    monkeypatch.setattr(ThreadCommunicator, "allreduce_mean", mean_that_depends_on_rank)
    assert split(watch(dense))
