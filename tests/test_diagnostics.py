"""Diagnostics against the definitions, worked out from what every worker's state dict says."""

from __future__ import annotations

import csv
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hvd_saef
from hvd_saef.diagnostics import NUMBERS, Measurement, Monitor, auxiliary_point
from tests.workers import NO_MODEL, Run, bits, everything, together

pytestmark = pytest.mark.filterwarnings(NO_MODEL)
WORKERS, ROUNDS = 3, 9
SETTINGS: list[dict[str, Any]] = [
    {},
    {"feedback": "ef"},
    {"step_ahead": 0.5},
    {"server_step_ahead": 1.0},
    {"server_step_ahead": 0.25, "bucket_bytes": 64},
    {"double_compression": False},
    {"averaging_period": 3, "server_step_ahead": 1.0},
    {"compression": hvd_saef.Compression.topk(0.2), "server": "sharded", "block_size": 4},
    {"local_steps": 3, "averaging_period": 2},
    {"warmup_steps": 4},
    {"feedback": "none"},
]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def server_errors(states: list[dict[str, Any]]) -> Tensor:
    """All of s, from the stretches that the workers hold."""
    whole = {name: torch.zeros_like(x).flatten() for name, x in states[0]["x"].items()}
    for state in states:
        for name, piece in state["server_errors"].items():
            whole[name][piece["start"] : piece["start"] + piece["values"].numel()] = piece["values"]
    return flat(whole)


def history(**options: Any) -> list[tuple[list[dict[str, Any]], list[Tensor], Measurement]]:
    """For each round: every worker's state before it, where each took its gradient, what was measured."""

    def work(rank: int) -> list[tuple[dict[str, Any], Tensor, list[Measurement]]]:
        run = Run(rank, dtype=torch.float64, **options).step(run_steps)  # the errors are not zero any more
        monitor = Monitor(run.optimizer, every=1)
        rounds = []
        for _ in range(ROUNDS):
            point = flat(dict(enumerate_names(run)))
            state = run.optimizer.state_dict()["hvd_saef"]
            run.step(run_steps)
            rounds.append((state, point, list(monitor._since)))
            monitor.means()
        return rounds

    run_steps = options.get("local_steps", 1)
    everyone = together(WORKERS, work)
    result = []
    for workers in zip(*everyone, strict=True):
        states, points, measured = zip(*workers, strict=True)
        assert all(taken == measured[0] for taken in measured)  # the same on all workers
        assert len(measured[0]) == 1
        result.append((list(states), list(points), measured[0][0]))
    return result


def enumerate_names(run: Run) -> list[tuple[str, Tensor]]:
    return [(name, p.detach().clone()) for name, p in zip(run.ours("x"), run.parameters, strict=True)]


def squared(values: Tensor) -> float:
    return float((values**2).sum())


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_definitions(options: dict[str, Any]) -> None:
    for states, points, measured in history(**options):
        errors = [flat(state["errors"]) for state in states]
        mean = torch.stack(errors).mean(0)
        s = server_errors(states)
        auxiliary = flat(states[0]["x"]) - (s + mean)
        expected = {
            "round": states[0]["rounds"],
            "mismatch_exact": sum(squared(auxiliary - b) for b in points) / WORKERS,
            "mismatch_bound_ef": squared(s) + sum(map(squared, errors)) / WORKERS,
            "mismatch_bound_saef": squared(s) + sum(squared(e - mean) for e in errors) / WORKERS,
            "server_error": squared(s),
            "error": sum(map(squared, errors)) / WORKERS,
            "mean_error": squared(mean),
            "error_variance": sum(squared(e - mean) for e in errors) / WORKERS,
        }
        for name, value in expected.items():
            assert getattr(measured, name) == pytest.approx(value, rel=1e-9, abs=1e-18), name
        assert measured.step_ahead_pays == (expected["error_variance"] <= expected["mean_error"])


@pytest.mark.parametrize("feedback", ["ef", "saef"])
def test_bounds_bound(feedback: str) -> None:
    """The exact mismatch is at most twice its own feedback's bound, and not that of a scaled one."""
    for _, _, measured in history(feedback=feedback):
        bound = measured.mismatch_bound_ef if feedback == "ef" else measured.mismatch_bound_saef
        assert 0 < measured.mismatch_exact <= 2 * bound
        assert measured.mismatch_exact > 0.01 * bound


def test_nothing_is_left_at_an_averaging_round_with_beta() -> None:
    """Eq. 11: the bound is ‖s‖²; with β = 1 the mismatch is zero."""
    averaged = [m for _, _, m in history(averaging_period=3, server_step_ahead=1.0) if (m.round + 1) % 3 == 0]
    assert len(averaged) == 3
    for measured in averaged:
        assert measured.mismatch_exact < 1e-24
        assert measured.mismatch_bound_saef == pytest.approx(measured.server_error)
        assert measured.server_error > 0


@pytest.mark.parametrize("compression", [hvd_saef.Compression.sign, hvd_saef.Compression.topk(0.25)])
def test_delta_and_update(compression: hvd_saef.Compressor) -> None:
    """For one parameter and plain SGD, whose update is rate times gradient."""

    def work(rank: int) -> tuple[list[tuple[float, float]], list[Measurement]]:
        x = torch.nn.Parameter(torch.zeros(40, dtype=torch.float64))
        inner = torch.optim.SGD([x], lr=0.5)
        optimizer = hvd_saef.DistributedOptimizer(inner, compression=compression)
        monitor = Monitor(optimizer, every=1)
        expected = []
        for step in range(4):
            generator = torch.Generator().manual_seed(10 * rank + step)
            x.grad = torch.randn(40, dtype=torch.float64, generator=generator)
            before = optimizer._saef.modes.state
            error = torch.zeros(40, dtype=torch.float64) if before is None else before.buckets[0].e.clone()
            change = error + 0.5 * x.grad
            optimizer.step()
            lost = optimizer._saef.modes.state.buckets[0].e
            expected.append((1 - squared(lost) / squared(change), squared(0.5 * x.grad)))
        return expected, monitor._since

    everyone = together(WORKERS, work)
    for step in range(4):
        delta, update = (sum(k[0][step][i] for k in everyone) / WORKERS for i in (0, 1))
        measured = everyone[0][1][step]
        assert measured.delta == pytest.approx(delta)
        assert measured.update == pytest.approx(update)
        assert 0.2 < measured.delta < 1


def test_no_compression_loses_nothing() -> None:
    for _, _, measured in history(compression=hvd_saef.Compression.none):
        assert measured.delta == 1
        assert measured.mismatch_exact == measured.error == 0


@pytest.mark.parametrize("options", [{}, {"averaging_period": 3}, {"local_steps": 2}], ids=str)
def test_training_is_left_alone(options: dict[str, Any]) -> None:
    """The same bits with and without a monitor and visits to x̃."""

    def work(rank: int, watched: bool) -> dict[str, bytes]:
        run = Run(rank, **options)
        if watched:
            Monitor(run.optimizer, every=2)
        for _ in range(8):
            run.step()
            if watched:
                with auxiliary_point(run.optimizer):
                    pass
        return everything(run)

    assert together(WORKERS, lambda rank: work(rank, True)) == together(
        WORKERS, lambda rank: work(rank, False)
    )


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_auxiliary_point(options: dict[str, Any]) -> None:
    """X - (s + ē) within, and every bit back afterwards."""

    def work(rank: int) -> tuple[dict[str, Any], Tensor, bool]:
        run = Run(rank, dtype=torch.float64, **options).step(7)
        before = bits(run.parameters)
        with auxiliary_point(run.optimizer):
            there = flat(dict(enumerate_names(run)))
        return run.optimizer.state_dict()["hvd_saef"], there, bits(run.parameters) == before

    everyone = together(WORKERS, work)
    states = [state for state, _, _ in everyone]
    mean = torch.stack([flat(state["errors"]) for state in states]).mean(0)
    for state, there, restored in everyone:
        expected = flat(state["x"]) - (server_errors(states) + mean)
        torch.testing.assert_close(there, expected, rtol=1e-13, atol=1e-15)
        assert restored


def test_workers_of_several_ranks() -> None:
    """Ranks of a node that see the same gradients measure what as many workers would."""

    def work(rank: int, ranks: int, **options: Any) -> list[Measurement]:
        run = Run(rank // ranks, dtype=torch.float64, **options)
        monitor = Monitor(run.optimizer, every=1)
        run.step(6)
        with auxiliary_point(run.optimizer):
            assert all(p.isfinite().all() for p in run.parameters)
        return monitor._since

    alone = hvd_saef.run_workers(2, lambda rank: work(rank, 1))
    nodes = hvd_saef.run_workers(2, lambda rank: work(rank, 2, worker="node"), ranks=2)
    for measured in nodes:
        for one, other in zip(measured, alone[0], strict=True):
            assert astuple(one) == pytest.approx(astuple(other), rel=1e-9, abs=1e-15)


def test_before_the_first_step_it_is_where_training_starts() -> None:
    def work(rank: int) -> bool:
        run = Run(rank)
        before = bits(run.parameters)
        with auxiliary_point(run.optimizer):
            return bits(run.parameters) == before

    assert all(together(2, work))


class Scalars:
    """In a SummaryWriter's place."""

    def __init__(self) -> None:
        self.added: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Remember it."""
        self.added.append((name, value, step))


def test_every_nth_round_is_written(tmp_path: Path) -> None:
    scalars = Scalars()

    def work(rank: int) -> tuple[dict[str, float], dict[str, float]]:
        run = Run(rank, local_steps=2)
        monitor = Monitor(run.optimizer, every=3, csv=tmp_path / "log.csv", tensorboard=scalars)
        run.step(2 * 8)  # rounds 0 to 7
        means = monitor.means()
        monitor.close()
        run.step(2 * 4)
        return means, monitor.means()

    (means, nothing), _ = together(2, work)
    assert nothing == {}
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == NUMBERS
    assert [float(row["round"]) for row in rows] == [0, 3, 6]
    for name in NUMBERS:
        assert means[name] == pytest.approx(sum(float(row[name]) for row in rows) / 3)
    assert means["error"] > 0
    assert [(n, s) for n, _, s in scalars.added if n == "hvd_saef/delta"] == [
        ("hvd_saef/delta", step) for step in (0, 3, 6)
    ]


def test_refusals() -> None:
    def work(rank: int) -> None:
        with pytest.raises(ValueError, match=r"every=0: a whole number of rounds >= 1 is allowed"):
            Monitor(Run(rank).optimizer, every=0)
        with pytest.raises(ValueError, match="overlap=True"):
            Monitor(Run(rank, overlap=True).optimizer, every=1)
        plain = Run(rank, feedback="none", compression=hvd_saef.Compression.none)
        with pytest.raises(ValueError, match="no errors to measure"):
            Monitor(plain.optimizer, every=1)

    together(2, work)
