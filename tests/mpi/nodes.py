"""Workers of two ranks on real MPI and Horovod, in a job of their own that knows its process sets.

mpirun -np 4 python -m mpi4py -m tests.mpi.nodes OUTPUT [NAME ...]

With HOROVOD_DYNAMIC_PROCESS_SETS=1 they are added while the job runs.
"""

from __future__ import annotations

import os
import sys

import horovod.torch as hvd
import pytest
from mpi4py import MPI

import hvd_saef
from tests.problems import same_bits
from tests.transport import team_checks
from tests.transport.checks import Check, run_checks, same_everywhere
from tests.transport.team_checks import RANKS, groups, setup, train

DYNAMIC = os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS") == "1"
CHECKS: dict[str, Check] = dict(team_checks.CHECKS)


def check(function: Check) -> Check:
    """Register a check."""
    CHECKS[function.__name__] = function
    return function


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


if __name__ == "__main__":
    known = hvd_saef.process_sets(groups(MPI.COMM_WORLD.Get_size()))
    hvd.init(process_sets="dynamic" if DYNAMIC else known)
    run_checks(CHECKS, sys.argv[1], sys.argv[2:])
