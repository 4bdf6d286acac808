"""Ranks that are killed, stopped, hang, or end early, in real jobs: the others are told, and end or go on."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest

from tests.mpi.launch import MPIRUN, run_job

pytest.importorskip("mpi4py", reason="needs mpi4py")
pytest.importorskip("horovod.torch", reason="needs Horovod")

PATIENCE = {"HVD_SAEF_STALL_WARNING_S": "1", "HVD_SAEF_STALL_ABORT_S": "3"}


def job(fault: str, ranks: int, folder: Path, **environment: str) -> tuple[int, str, float]:
    """Exit code, all that was said, and the seconds from the fault to the end."""
    command = [MPIRUN, "-np", str(ranks), sys.executable, "-m", "tests.transport.victim", fault, str(folder)]
    done = run_job(command, environment=environment)
    return done.returncode, done.stdout + done.stderr, time.time() - float((folder / "fault").read_text())


def ends(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("end-*"))]


@pytest.mark.parametrize("ranks", [2, 4])
def test_those_who_wait_name_the_missing_rank_and_end_the_job(ranks: int, tmp_path: Path) -> None:
    code, said, seconds = job("sigstop", ranks, tmp_path, **PATIENCE)
    assert code != 0
    assert seconds > 3
    assert f"rank {ranks - 1} did not arrive" in said
    assert "the agreement of all ranks, round 4" in said
    assert re.search(r"RuntimeWarning: rank \d has waited", said)
    assert re.search(r"StalledExchangeError: rank \d has waited (?!0|1\.|2\.)", said)
    assert "ends the job" in said
    assert ends(tmp_path) == []


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_pause_costs_nothing_but_time(ranks: int, tmp_path: Path) -> None:
    """Warned of, then gone on with: to the bit where a job without it comes to."""
    (tmp_path / "pause").mkdir()
    (tmp_path / "none").mkdir()
    code, said, _ = job("pause", ranks, tmp_path / "pause", HVD_SAEF_STALL_WARNING_S="1")
    assert code == 0, said
    assert f"rank {ranks - 1} did not arrive" in said
    assert "goes on with the agreement of all ranks, round 4 after" in said
    code, said, _ = job("none", ranks, tmp_path / "none")
    assert code == 0, said
    assert "arrive" not in said
    assert ends(tmp_path / "pause") == ends(tmp_path / "none")
    assert len(ends(tmp_path / "none")) == ranks
    assert len(set(ends(tmp_path / "none"))) == 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_ends_early_is_told_at_once(ranks: int, tmp_path: Path) -> None:
    """By default, without any setting: it will never come."""
    code, said, _ = job("early-end", ranks, tmp_path)
    assert code != 0
    assert "did not arrive" not in said
    # With it may have ended a rank that was late: Horovod shuts down on all.
    assert re.search(rf"ranks? (\d, )*{ranks - 1} ended before the agreement of all ranks, round 4", said)
    assert "common_steps" in said


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_never_wraps(ranks: int, tmp_path: Path) -> None:
    code, said, _ = job("never-wraps", ranks, tmp_path, **PATIENCE)
    assert code != 0
    assert f"rank {ranks - 1} did not arrive" in said
    assert "in hvd_saef.DistributedOptimizer" in said


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_dies_takes_the_job_along(ranks: int, tmp_path: Path) -> None:
    code, said, _ = job("sigkill", ranks, tmp_path)
    assert code != 0
    assert re.search("signal:? 9", said, re.IGNORECASE)  # each launcher says it in its own way


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_that_fails_takes_the_job_along(ranks: int, tmp_path: Path) -> None:
    code, said, _ = job("exception", ranks, tmp_path)
    assert code != 0
    assert "OSError: this rank's disk is gone" in said
    assert f"rank {ranks - 1} failed and ends the job" in said


def test_a_short_soak() -> None:
    """`python -m tests.mpi.soak` does it for 20,000 steps."""
    command = [MPIRUN, "-np", "2", sys.executable, "-m", "tests.mpi.soak", "600", "4"]
    done = run_job(command)
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["same"], done.stderr[-2000:]
    assert report["threads"][0] == report["threads"][1]
    assert report["descriptors"][0] == report["descriptors"][1]
