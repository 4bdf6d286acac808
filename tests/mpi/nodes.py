"""Workers of two ranks on real MPI and Horovod, in a job of their own that knows its process sets.

mpirun -np 4 python -m mpi4py -m tests.mpi.nodes OUTPUT.json [NAME ...]

With HOROVOD_DYNAMIC_PROCESS_SETS=1 they are added while the job runs.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from mpi4py import MPI

import hvd_saef
from tests.mpi.checks import (
    PAYLOAD_SETUPS,
    REDUCED_SETUPS,
    Check,
    backward,
    is_as_with_threads,
    run_checks,
    same_everywhere,
    small_model,
)
from tests.nodes import of_nodes
from tests.oracle import Setup, run
from tests.problems import STEPS, Outcome, curved_valley, run_library, same_bits, schedule, start_point, worst

TOLERANCE = 1e-10
RANKS = 2
DYNAMIC = os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS") == "1"
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
    return Setup(workers=hvd.size() // RANKS, lr=schedule, **(defaults | settings))


def train(settings: Setup, **options: Any) -> Outcome:
    """This rank's run of the library."""
    return run_library(settings, hvd.rank(), start_point(), **({"worker": groups(hvd.size())} | options))


@check
def agrees_with_the_oracle() -> None:
    for settings, server in PAYLOAD_SETUPS + REDUCED_SETUPS:
        wanted, node = setup(**settings), hvd.rank() // RANKS
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
            inner, model=model, worker=groups(hvd.size()), bucket_bytes=50, overlap=overlap
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
    truth = run(wanted, start_point(), of_nodes(curved_valley, [hvd.size()]), STEPS)
    outcome = train(wanted, worker="node")
    assert same_everywhere(outcome)
    assert worst(outcome.x, truth.x) <= TOLERANCE
    assert outcome.stats["payload_bytes_sent"] == 0


@check
def a_rank_that_drifts_is_found() -> None:
    def drifts(step: int, optimizer: Any) -> None:
        if step == 3 and hvd.rank() == hvd.size() - 1:
            state = optimizer.state[optimizer.param_groups[0]["params"][0]]
            state["momentum_buffer"].view(-1)[0] += 1e-9

    last = f"rank {hvd.size() - 1}"
    with pytest.raises(hvd_saef.ConsensusError, match=rf"differs between the ranks of one worker.*{last}\."):
        train(setup(), each_step=drifts, check_consensus_every=1)
    train(setup(), check_consensus_every=1)


@check
def horovods_process_sets_are_workers() -> None:
    numbers = groups(hvd.size())
    sets = hvd_saef.process_sets(numbers)[: len(numbers)]
    if DYNAMIC:
        hvd.barrier()
        for known in sets:  # hvd_saef adds those that went, and those of the lanes
            assert known.process_set_id is None or hvd.remove_process_set(known)
        hvd.barrier()
        sets = [hvd.add_process_set(ranks) for ranks in numbers]
    by_set, by_number = train(setup(averaging_period=3), worker=sets), train(setup(averaging_period=3))
    assert same_bits(by_set.x, by_number.x)
    assert same_bits(by_set.errors, by_number.errors)


@check
def process_sets_that_horovod_does_not_know_are_added_or_refused() -> None:
    if hvd.size() > 2 * RANKS:
        other = [list(range(3)), list(range(3, hvd.size()))]
        if DYNAMIC:
            assert same_everywhere(train(setup(averaging_period=3), worker=other, check_consensus_every=1))
            return
        with pytest.raises(ValueError, match=r"no process set of the ranks \[0, 1, 2\].*process_sets\(\)"):
            train(setup(), worker=other)


@check
def everyone_is_told_of_different_workers() -> None:
    with pytest.raises(hvd_saef.ConfigurationMismatchError, match="on worker: 'rank' on rank 0, "):
        train(setup(), worker="rank" if hvd.rank() == 0 else groups(hvd.size()))


if __name__ == "__main__":
    known = hvd_saef.process_sets(groups(MPI.COMM_WORLD.Get_size()))
    hvd.init(process_sets="dynamic" if DYNAMIC else known)
    run_checks(CHECKS, sys.argv[1], sys.argv[2:])
