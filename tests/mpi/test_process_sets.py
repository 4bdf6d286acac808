"""Process sets that come and go, in a job of their own."""

from __future__ import annotations

import sys

import pytest

from tests.mpi.launch import MPIRUN, run_job

pytest.importorskip("mpi4py", reason="needs mpi4py")
pytest.importorskip("horovod.torch", reason="needs Horovod")


def test_process_sets_removed_and_added_again() -> None:
    command = [MPIRUN, "-np", "2", sys.executable, "-m", "tests.mpi.process_sets"]
    job = run_job(command, environment={"HOROVOD_DYNAMIC_PROCESS_SETS": "1"})
    assert job.returncode == 0, job.stdout[-5000:] + job.stderr[-5000:]
