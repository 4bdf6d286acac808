"""A checkpoint that an MPI job wrote is read over torch.distributed, which goes on to the same bits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.mpi.launch import MPIRUN, run_job
from tests.torch_distributed.launch import run_ranks

RANKS = 2


def test_written_over_mpi_and_read_over_torch_distributed(tmp_path: Path) -> None:
    pytest.importorskip("horovod.torch", reason="needs Horovod")
    resumes = ["-m", "tests.transport.resumes"]
    command = [MPIRUN, "-np", str(RANKS), sys.executable, *resumes, "save", str(tmp_path)]
    job = run_job(command)
    assert job.returncode == 0, job.stdout + job.stderr
    for ended in run_ranks(RANKS, [*resumes, "load", str(tmp_path)]):
        assert ended.code == 0, ended.said
    saved, loaded = (
        [(tmp_path / f"{how}-{rank}").read_bytes() for rank in range(RANKS)] for how in ("save", "load")
    )
    assert saved == loaded
    assert len(saved[0]) > 0
    assert saved[0] != saved[1]  # each rank has errors of its own
