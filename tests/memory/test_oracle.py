"""Every combination of settings agrees with the oracle to 1e-10 in float64 after 30 steps."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hvd_saef import run_workers
from tests.oracle import Array, Setup, Trajectory, run
from tests.problems import (
    STEPS,
    Outcome,
    curved_valley,
    run_library,
    schedule,
    start_point,
    worst,
)

pytestmark = pytest.mark.both_arithmetics

TOLERANCE = 1e-10

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"optimizer": "sgd"},
    "SGDM": {"optimizer": "sgdm", "weight_decay": 0.01},
    "Nesterov": {"optimizer": "nesterov", "weight_decay": 0.01},
    "AdamW": {"optimizer": "adamw", "weight_decay": 0.1},
}


def modes() -> Iterator[tuple[dict[str, Any], str]]:
    """Feedback, α, β, single-way or double-way, with each server that they allow."""
    for feedback, alpha in (("ef", 1.0), ("saef", 0.0), ("saef", 0.5), ("saef", 1.0)):
        base = {"feedback": feedback, "step_ahead": alpha}
        yield base | {"double_compression": False}, "auto"
        yield base, "replicated"
        yield base, "sharded"
        if feedback == "saef":
            yield base | {"server_step_ahead": 0.5}, "replicated"
            yield base | {"server_step_ahead": 1.0}, "replicated"


def distance(outcomes: list[Outcome], truth: Trajectory) -> float:
    """How far the workers are from the oracle in anything that there is to compare."""
    distances = []
    for k, outcome in enumerate(outcomes):
        distances.append(worst(outcome.x, truth.x))
        distances.append(worst(outcome.parameters, truth.parameters[k]))
        distances.append(worst(outcome.errors, truth.errors[k]))
    distances.append(worst(assemble(outcomes, truth.server_error), truth.server_error))
    return max(distances)


def assemble(outcomes: list[Outcome], like: list[Array]) -> list[Array]:
    """The server's error from the pieces that the workers hold; what nobody holds is zero."""
    whole = [np.zeros_like(array) for array in like]
    for outcome in outcomes:
        for name, (start, values) in outcome.server_error.items():
            place = whole[int(name.split(".")[-1])]
            place.reshape(-1)[start : start + values.size] = values
    return whole


def disagreement(setup: Setup, **options: Any) -> float:
    """The library's distance from the oracle for one setup."""
    truth = run(setup, start_point(), curved_valley, STEPS)
    outcomes = run_workers(setup.workers, lambda rank: run_library(setup, rank, start_point(), **options))
    return distance(outcomes, truth)


@pytest.fixture(autouse=True)
def quick_threads() -> Iterator[None]:
    """Let the simulation's threads hand over quickly, and silence the advice to pass model=."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("compressor", ["sign", "topk"])
@pytest.mark.parametrize("local_steps", [1, 3])
def test_grid(arithmetic: str, compressor: str, name: str, workers: int, local_steps: int) -> None:
    if arithmetic == "twins" and name != "SGDM":
        pytest.skip(
            "the twins are given updates, whichever optimizer made them: the kernels' grid has all four"
        )
    wrong = {}
    for (mode, server), period, block_size in itertools.product(modes(), (None, 2, 4), (None, 17)):
        setup = Setup(
            workers=workers,
            compressor=compressor,
            local_steps=local_steps,
            averaging_period=period,
            block_size=block_size,
            lr=schedule,
            **OPTIMIZERS[name],
            **mode,
        )
        found = disagreement(setup, server=server)
        if not found <= TOLERANCE:
            wrong[str((mode, server, period, block_size))] = found
    assert not wrong


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("compressor", ["sign", "topk", "none"])
@pytest.mark.parametrize("feedback", ["saef", "ef", "none"])
@pytest.mark.parametrize("server", ["replicated", "sharded"])
def test_warm_up_and_feedback_none(workers: int, compressor: str, feedback: str, server: str) -> None:
    for warmup in (0, 4):
        setup = Setup(
            workers=workers,
            compressor=compressor,
            feedback=feedback,
            warmup_steps=warmup,
            local_steps=2,
            lr=schedule,
            **OPTIMIZERS["SGDM"],
        )
        assert disagreement(setup, server=server) <= TOLERANCE


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_buckets_make_no_difference(bucket_bytes: int) -> None:
    setup = Setup(workers=3, compressor="sign", lr=schedule, **OPTIMIZERS["SGDM"])
    assert disagreement(setup, bucket_bytes=bucket_bytes) <= TOLERANCE


@pytest.mark.parametrize(
    "broken",
    [
        {"step_ahead": 0.9},
        {"server_step_ahead": 0.1},
        {"double_compression": False},
        {"averaging_period": 5},
        {"local_steps": 2},
        {"warmup_steps": 1},
        {"block_size": 16},
        {"weight_decay": 0.011},
        {"compressor": "topk"},
        {"feedback": "ef"},
    ],
    ids=str,
)
def test_the_oracle_tells_settings_apart(broken: dict[str, Any]) -> None:
    """The counter-test: the oracle of one setup is far from the library's run of another."""
    settings: dict[str, Any] = {
        "compressor": "sign",
        "averaging_period": 4,
        "block_size": 17,
        **OPTIMIZERS["SGDM"],
    }
    truth = run(Setup(workers=2, lr=schedule, **(settings | broken)), start_point(), curved_valley, STEPS)
    setup = Setup(workers=2, lr=schedule, **settings)
    outcomes = run_workers(2, lambda rank: run_library(setup, rank, start_point()))
    assert distance(outcomes, truth) > 1e-6
