"""worker="node": threads stand for the ranks of a node, against the oracle of as many workers as nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hvd_saef
from hvd_saef import Compression, ConsensusError, NonFiniteUpdateError, run_workers
from hvd_saef.round import round_end
from tests.nodes import of_nodes
from tests.oracle import Setup, run
from tests.problems import STEPS, Outcome, curved_valley, run_library, same_bits, schedule, start_point, worst
from tests.workers import NO_MODEL, Run, caught, together

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
]
TOLERANCE = 1e-10
SETUPS: list[tuple[dict[str, Any], str]] = [
    ({"double_compression": False}, "auto"),
    ({}, "replicated"),
    ({"block_size": 17}, "sharded"),
    ({"feedback": "ef", "averaging_period": 3}, "auto"),
    ({"server_step_ahead": 1.0, "step_ahead": 0.5}, "auto"),
    ({"compressor": "topk", "local_steps": 3, "optimizer": "adamw"}, "sharded"),
    ({"warmup_steps": 4, "local_steps": 2}, "auto"),
    ({"compressor": "none"}, "auto"),
    ({"compressor": "none", "feedback": "none", "optimizer": "sgd", "weight_decay": 0.0}, "auto"),
]


def setup(workers: int, **settings: Any) -> Setup:
    defaults: dict[str, Any] = {"compressor": "sign", "optimizer": "sgdm", "weight_decay": 0.01}
    return Setup(workers=workers, lr=schedule, **(defaults | settings))


def outcomes(wanted: Setup, ranks: int, **options: Any) -> list[Outcome]:
    def work(rank: int) -> Outcome:
        return run_library(wanted, rank, start_point(), **({"worker": "node"} | options))

    return run_workers(wanted.workers, work, ranks=ranks)


@pytest.mark.parametrize(("workers", "ranks"), [(2, 2), (3, 2), (2, 3), (1, 2)])
@pytest.mark.parametrize(("settings", "server"), SETUPS, ids=str)
def test_nodes_are_the_oracles_workers(
    settings: dict[str, Any], server: str, workers: int, ranks: int
) -> None:
    wanted = setup(workers, **settings)
    truth = run(wanted, start_point(), of_nodes(curved_valley, workers * [ranks]), STEPS)
    found = outcomes(wanted, ranks, server=server)
    for rank, outcome in enumerate(found):
        node = rank // ranks
        if wanted.feedback == "none":
            assert worst(outcome.parameters, truth.x) <= TOLERANCE
            continue
        assert worst(outcome.x, truth.x) <= TOLERANCE
        assert worst(outcome.parameters, truth.parameters[node]) <= TOLERANCE
        assert worst(outcome.errors, truth.errors[node]) <= TOLERANCE
        assert same_bits(outcome.x, found[0].x)
        assert same_bits(outcome.errors, found[node * ranks].errors)


def test_the_oracle_tells_nodes_from_ranks() -> None:
    """The counter-test: gradients that are not averaged on the node end elsewhere."""
    wanted = setup(2)
    truth = run(wanted, start_point(), curved_valley, STEPS)
    assert worst(outcomes(wanted, 2)[0].x, truth.x) > 1e-6


@pytest.mark.parametrize(("settings", "server"), SETUPS, ids=str)
@pytest.mark.parametrize("counts", [[1, 3], [2, 1, 2]], ids=str)
def test_nodes_of_different_sizes(settings: dict[str, Any], server: str, counts: list[int]) -> None:
    wanted = setup(len(counts), weights=tuple(map(float, counts)), **settings)
    truth = run(wanted, start_point(), of_nodes(curved_valley, counts), STEPS)

    def work(rank: int) -> Outcome:
        return run_library(wanted, rank, start_point(), server=server, worker="node", weights="ranks")

    found = run_workers(len(counts), work, ranks=counts)
    alike = run(setup(len(counts), **settings), start_point(), of_nodes(curved_valley, counts), STEPS)
    assert worst(truth.x, alike.x) > 1e-6  # the weights matter
    for rank, outcome in enumerate(found):
        node = next(k for k in range(len(counts)) if rank < sum(counts[: k + 1]))
        ours = outcome.parameters if wanted.feedback == "none" else outcome.x
        assert worst(ours, truth.x) <= TOLERANCE
        if wanted.feedback != "none":
            assert worst(outcome.errors, truth.errors[node]) <= TOLERANCE
            assert same_bits(outcome.x, found[0].x)


def test_nodes_of_different_sizes_are_refused() -> None:
    def fn(rank: int) -> None:
        Run(rank, worker="node")

    failures = [attempt_unequal(fn, counts) for counts in ([1, 2], [2, 2])]
    assert failures[1] is None
    assert "the workers have [1, 2] ranks" in str(failures[0])
    assert "weights='ranks'" in str(failures[0])


def attempt_unequal(fn: Any, counts: list[int]) -> Exception | None:
    try:
        run_workers(2, fn, ranks=counts)
    except ValueError as failure:
        return failure
    return None


@pytest.mark.parametrize(
    ("worker", "error", "message"),
    [
        ("host", ValueError, 'worker=\'host\': "rank", "node", or a list'),
        (3, TypeError, "worker=3: "),
        ([], TypeError, "a list of Horovod process sets"),
        ([[0, 1], [1, 2, 3]], ValueError, "each of the ranks \\[0, 1, 2, 3\\] is allowed, once"),
        ([[0, 1]], ValueError, "is allowed, once"),
    ],
    ids=str,
)
def test_other_workers_are_refused(worker: Any, error: type[Exception], message: str) -> None:
    def fn(rank: int) -> None:
        with pytest.raises(error, match=message):
            Run(rank, worker=worker)

    together(2, fn, ranks=2)


def test_lists_of_ranks_are_workers() -> None:
    def by(worker: Any) -> Any:
        def fn(rank: int) -> list[torch.Tensor]:
            return Run(rank, worker=worker).step(4).x()

        return together(2, fn, ranks=2)

    nodes, lists, others = by("node"), by([[2, 3], [0, 1]]), by([[0, 2], [1, 3]])
    for rank in range(4):
        assert all(torch.equal(a, b) for a, b in zip(nodes[rank], lists[rank], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(nodes[0], others[0], strict=True))


def drift(what: str) -> Callable[[int], None]:
    """The mutation of the last of four ranks."""

    def fn(rank: int) -> None:
        job = Run(rank, worker="node", check_consensus_every=2).step(3)
        if rank == 3:
            parameter = job.parameters[0]
            if what == "momentum":
                job.inner.state[parameter]["momentum_buffer"].view(-1)[0] += 1e-6
            elif what == "error":
                job.optimizer._saef.modes.state.buckets[0].e[0] += 1e-6
            else:
                job.inner.param_groups[0]["lr"] *= 1.001
        job.step()

    return fn


@pytest.mark.parametrize("what", ["momentum", "error", "rate"])
def test_a_rank_that_drifts_is_found(what: str) -> None:
    """Slices of payloads come from all ranks, so x may stay the same; the rest does not."""
    for failure in caught(2, drift(what), ranks=2):
        assert isinstance(failure, ConsensusError)
        assert "rank 3. " in str(failure)  # alone
        if what != "rate":  # which reaches x in the same round
            assert "differs between the ranks of one worker: " in str(failure)
            assert "on rank 2, " in str(failure)
            assert "rank 0" not in str(failure)


@pytest.mark.parametrize("what", ["momentum", "error"])
def test_a_rank_that_drifts_is_found_by_that_check_alone(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter-test: that x is the same on all ranks does not show it."""
    monkeypatch.setattr(round_end, "check_workers", lambda *_: None)
    together(2, drift(what), ranks=2)


def test_ranks_that_start_apart_are_found() -> None:
    def fn(rank: int) -> None:
        job = Run(rank, worker="node")
        job.inner.state[job.parameters[0]]["momentum_buffer"] = torch.full((5, 7), float(rank == 1))
        job.step()

    for failure in caught(2, fn, ranks=2):
        assert isinstance(failure, ConsensusError)
        assert "momentum_buffer of 'noname.0.0'" in str(failure)
        assert "broadcast_optimizer_state" in str(failure)


def test_bytes_between_nodes_are_those_of_one_rank_a_node() -> None:
    def fn(worker: str) -> Any:
        return lambda rank: Run(rank, worker=worker, averaging_period=3).step(6).optimizer.stats()

    one, two = together(3, fn("rank")), together(3, fn("node"), ranks=2)
    for name in ("payload_bytes_sent", "payload_bytes_received", "averaging_bytes_sent", "compression_ratio"):
        assert [found[name] for found in two] == [found[name] for found in one for _ in range(2)]
        assert one[0][name] > 0
    size, slots, rounds = 63, 4, 6
    gradients = rounds * 4 * (size + slots)  # 2·(L - 1)/L times that, by L = 2 ranks
    gathered = sum(found["node_bytes_sent"] - gradients for found in two[:2])
    received = two[0]["payload_bytes_received"] + 2 * 4 * size  # errors were averaged twice, whole
    assert gathered == received  # each of the two tells the other its half
    assert two[0]["seconds_node"] > 0


def test_a_nan_on_one_rank_is_everyones() -> None:
    def fn(rank: int) -> None:
        job = Run(rank, worker="node").step(2)
        job.set_gradients()
        if rank == 3 and job.parameters[0].grad is not None:
            job.parameters[0].grad[0, 0] = torch.nan
        job.optimizer.step()

    for failure in caught(2, fn, ranks=2):
        assert isinstance(failure, NonFiniteUpdateError)
        assert "'noname.0.0' on rank 3." in str(failure)


def test_an_overflow_on_one_rank_skips_the_step_of_all() -> None:
    def fn(rank: int) -> None:
        parameter = nn.Parameter(torch.ones(3))
        optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1), worker="node")
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0 * (1 + rank % 2))  # scales may differ
        for step in range(3):
            optimizer.zero_grad()
            factor = float("inf") if (rank, step) == (1, 1) else float(rank)
            scaler.scale((parameter * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.stats()["skipped"] == 1
        means = [0.5, 2.5]  # of the factors, unscaled, on each node
        taken = 2 * 0.1 * sum(means) / 2
        x = next(iter(optimizer.state_dict()["hvd_saef"]["x"].values()))
        torch.testing.assert_close(x, torch.full((3,), 1 - taken))

    together(2, fn, ranks=2)


def test_clipping_sees_the_nodes_mean() -> None:
    def fn(rank: int) -> float:
        parameter = nn.Parameter(torch.zeros(2))
        inner = torch.optim.SGD([parameter], lr=1.0)
        optimizer = hvd_saef.DistributedOptimizer(inner, worker="node", compression=Compression.none)
        parameter.grad = torch.tensor([1.0, 0.0]) if rank % 2 else torch.tensor([0.0, 1.0])
        optimizer.synchronize()
        norm = torch.nn.utils.clip_grad_norm_([parameter], 10.0)
        with optimizer.skip_synchronize():
            optimizer.step()
        assert torch.equal(parameter.detach(), torch.tensor([-0.5, -0.5]))
        return float(norm)

    assert together(2, fn, ranks=2) == pytest.approx(4 * [0.5**0.5])
