"""The paper's runner gives the same under mpirun as with threads, but for how means round."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest

from benchmarks.paper.rows import Row, read
from tests.mpi.launch import ENVIRONMENT, ROOT

pytest.importorskip("horovod.torch", reason="needs Horovod")
pytest.importorskip("mlxtend", reason="needs the extra [examples]")


def run(folder: Path, *launcher: str, mpi: bool) -> list[Row]:
    """The rows of one run of the digits preset."""
    command = [*launcher, sys.executable, "-W", "ignore", "-m", "benchmarks.paper", "run", "digits"]
    command += ["--seeds", "0", "--methods", "SAEF-SignSGDM-DC", "--out", str(folder)]
    command += ["--mpi"] if mpi else []
    job = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert job.returncode == 0, job.stdout[-5000:] + job.stderr[-5000:]
    return read(folder / "digits" / "SAEF-SignSGDM-DC-seed0.csv")


def test_as_with_threads(tmp_path: Path) -> None:
    ranks = run(tmp_path / "a", "mpirun", "-np", "4", mpi=True)
    threads = run(tmp_path / "b", mpi=False)
    assert len(ranks) == len(threads) == 3
    for one, other in zip(ranks, threads, strict=True):
        assert (one.method, one.epoch, one.bytes_sent) == (other.method, other.epoch, other.bytes_sent)
        assert astuple(one)[4:] == pytest.approx(astuple(other)[4:], rel=1e-3, abs=2e-3)
