"""What is true of workers of two ranks on every transport: each check is run by all ranks of one job."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hvd_saef
from benchmarks.job import job
from tests.nodes import of_nodes
from tests.oracle import Setup, run
from tests.problems import Outcome, curved_valley, run_library, schedule, start_point, worst
from tests.transport.checks import (
    PAYLOAD_SETUPS,
    REDUCED_SETUPS,
    STEPS,
    TOLERANCE,
    Check,
    backward,
    is_as_with_threads,
    same_everywhere,
    small_model,
)

RANKS = 2
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check."""
    CHECKS[function.__name__] = function
    return function


def groups(size: int) -> list[list[int]]:
    """Ranks by twos."""
    return [[first, first + 1] for first in range(0, size, RANKS)]


def setup(**settings: Any) -> Setup:
    """An oracle's setup for this job's workers."""
    defaults: dict[str, Any] = {"compressor": "sign", "optimizer": "sgdm", "weight_decay": 0.01}
    return Setup(workers=job.size() // RANKS, lr=schedule, **(defaults | settings))


def train(settings: Setup, **options: Any) -> Outcome:
    """This rank's run of the library."""
    of_twos: dict[str, Any] = {"worker": groups(job.size())}
    return run_library(settings, job.rank(), start_point(), steps=STEPS, **(of_twos | options))


@check
def agrees_with_the_oracle() -> None:
    for settings, server in PAYLOAD_SETUPS + REDUCED_SETUPS:
        wanted, node = setup(**settings), job.rank() // RANKS
        truth = run(wanted, start_point(), of_nodes(curved_valley, wanted.workers * [RANKS]), STEPS)
        outcome = train(wanted, server=server)
        if wanted.feedback == "none" and wanted.compressor == "none":
            assert worst(outcome.parameters, truth.x) <= TOLERANCE
            continue
        assert same_everywhere(outcome)
        assert worst(outcome.x, truth.x) <= TOLERANCE
        assert worst(outcome.parameters, truth.parameters[node]) <= TOLERANCE
        assert worst(outcome.errors, truth.errors[node]) <= TOLERANCE


@check
def has_the_bits_of_threads() -> None:
    for settings, server in PAYLOAD_SETUPS:
        wanted = setup(**settings)
        outcome = train(wanted, server=server)
        assert outcome.stats["payload_bytes_sent"] > 0
        assert outcome.stats["node_bytes_sent"] > 0
        is_as_with_threads(outcome, wanted, RANKS, server=server, worker="node")


@check
def float32_and_bfloat16_agree_on_x() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for settings in ({"averaging_period": 3}, {"compressor": "none"}, {"compressor": "topk"}):
            assert same_everywhere(train(setup(**settings), dtype=dtype, check_consensus_every=1))


@check
def overlap_changes_no_bit() -> None:
    def trained(overlap: bool) -> list[torch.Tensor]:
        model = small_model(seed=0)
        inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = hvd_saef.DistributedOptimizer(
            inner, model=model, worker=groups(job.size()), bucket_bytes=50, overlap=overlap
        )
        for step in range(5):
            backward(model, step)
            assert not overlap or step == 0 or optimizer._saef.overlap.under_way
            optimizer.step()
        return list(optimizer.state_dict()["hvd_saef"]["errors"].values())

    assert all(torch.equal(a, b) for a, b in zip(trained(True), trained(False), strict=True))


@check
def all_ranks_on_one_host_are_one_node() -> None:
    wanted = Setup(workers=1, compressor="sign", lr=schedule)
    truth = run(wanted, start_point(), of_nodes(curved_valley, [job.size()]), STEPS)
    outcome = train(wanted, worker="node")
    assert same_everywhere(outcome)
    assert worst(outcome.x, truth.x) <= TOLERANCE
    assert outcome.stats["payload_bytes_sent"] == 0


@check
def a_rank_that_drifts_is_found() -> None:
    def drifts(step: int, optimizer: Any) -> None:
        if step == 3 and job.rank() == job.size() - 1:
            state = optimizer.state[optimizer.param_groups[0]["params"][0]]
            state["momentum_buffer"].view(-1)[0] += 1e-9

    last = f"rank {job.size() - 1}"
    with pytest.raises(hvd_saef.ConsensusError, match=rf"differs between the ranks of one worker.*{last}\."):
        train(setup(), each_step=drifts, check_consensus_every=1)
    train(setup(), check_consensus_every=1)


@check
def everyone_is_told_of_different_workers() -> None:
    with pytest.raises(hvd_saef.ConfigurationMismatchError, match="on worker: 'rank' on rank 0, "):
        train(setup(), worker="rank" if job.rank() == 0 else groups(job.size()))
