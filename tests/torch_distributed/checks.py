"""What is true on torch.distributed: each check is run by all ranks of one job.

torchrun --nproc-per-node 3 -m tests.torch_distributed.checks OUTPUT [NAME ...]
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import hvd_saef
from benchmarks.job import job
from tests.oracle import Setup, run
from tests.problems import curved_valley, run_library, schedule, start_point, worst
from tests.transport import checks as everywhere
from tests.transport import team_checks
from tests.transport.checks import STEPS, TOLERANCE, Check, run_checks, small_model

CHECKS: dict[str, Check] = dict(everywhere.CHECKS)
TEAM_CHECKS: dict[str, Check] = {f"teams_{name}": do for name, do in team_checks.CHECKS.items()}


def check(function: Check) -> Check:
    """Register a check."""
    CHECKS[function.__name__] = function
    return function


@check
def neither_horovod_nor_mpi_is_there() -> None:
    assert not {"horovod", "mpi4py"} & set(sys.modules)


@check
def groups_train_apart() -> None:
    if job.size() < 3:
        return
    numbers = [[0, 2], [rank for rank in range(job.size()) if rank not in (0, 2)]]
    pair, rest = (dist.new_group(members) for members in numbers)
    mine, other = (pair, rest) if job.rank() in numbers[0] else (rest, pair)
    workers = len(numbers[0] if mine is pair else numbers[1])
    wanted = Setup(workers=workers, compressor="sign", lr=schedule)
    outcome = run_library(wanted, dist.get_rank(mine), start_point(), steps=STEPS, process_group=mine)
    truth = run(wanted, start_point(), curved_valley, STEPS)
    assert worst(outcome.x, truth.x) <= TOLERANCE
    assert hvd_saef.common_steps(10 + job.rank(), process_group=mine) == 10 + min(
        numbers[0 if mine is pair else 1]
    )
    # A rank outside the group that it names trains alone, without waiting for anyone.
    alone = Setup(1, "none", feedback="none", lr=schedule)
    outcome = run_library(alone, 0, start_point(), steps=STEPS, process_group=other)
    truth = run(alone, start_point(), curved_valley, STEPS)
    assert worst(outcome.parameters, truth.x) <= TOLERANCE
    assert outcome.stats["dense_bytes_sent"] == 0


@check
def what_does_not_fit_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(3))

    def wrap(**options: Any) -> Any:
        return hvd_saef.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1), **options)

    with pytest.raises(ValueError, match=r"process_set=7: process sets are Horovod's"):
        wrap(process_set=7)
    with pytest.raises(ValueError, match=r"process_set=7, process_group=.*one of them is allowed"):
        wrap(process_set=7, process_group=dist.group.WORLD)
    model = small_model(seed=0)
    averaging = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(TypeError, match="DistributedDataParallel averages the gradients"):
        wrap(model=averaging)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    sharded = ZeroRedundancyOptimizer([parameter], torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="optimizer=ZeroRedundancyOptimizer: it exchanges parameters"):
        hvd_saef.DistributedOptimizer(sharded)
    wrap()


@check
def a_call_of_ddp_around_the_model_is_refused() -> None:
    """Also where a framework has put it there: Lightning does before the wrapping, accelerate after it."""
    inputs = torch.full((2, 3), 1.0 + job.rank())
    gradients = []
    for before in (True, False, None):
        model = nn.Linear(3, 2, bias=False)
        nn.init.ones_(model.weight)
        averaging = nn.parallel.DistributedDataParallel(model) if before else None
        optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
        if before is not None:
            averaging = averaging or nn.parallel.DistributedDataParallel(model)
            with pytest.raises(TypeError, match="around parameters that hvd_saef trains"):
                averaging(inputs)
            with torch.no_grad():
                averaging(inputs)
        model(inputs).square().sum().backward()  # the remedy: the module in it
        assert model.weight.grad is not None
        gradients.append(model.weight.grad)
        optimizer.step()
    assert torch.equal(gradients[0], gradients[2])  # this rank's own
    assert torch.equal(gradients[1], gradients[2])
    elsewhere = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))  # of another model, it is no matter
    elsewhere(inputs).sum().backward()


def main() -> None:
    """Start torch.distributed, and run the checks; those of teams where ranks come in twos."""
    job.begin()
    teams = TEAM_CHECKS if job.size() % 2 == 0 else {}
    run_checks(CHECKS | teams, sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    main()
