"""Process sets that come and go, in a job of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.mpi.launch import ENVIRONMENT, ROOT

pytest.importorskip("mpi4py", reason="needs mpi4py")
pytest.importorskip("horovod.torch", reason="needs Horovod")


def test_process_sets_removed_and_added_again() -> None:
    command = ["mpirun", "-np", "2", sys.executable, "-m", "tests.mpi.process_sets"]
    environment = ENVIRONMENT | {"HOROVOD_DYNAMIC_PROCESS_SETS": "1"}
    job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert job.returncode == 0, job.stdout[-5000:] + job.stderr[-5000:]
