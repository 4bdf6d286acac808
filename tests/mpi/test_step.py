"""benchmarks/step.py runs every method side by side, on MPI and gloo; not how fast."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from benchmarks.methods import METHODS
from benchmarks.timings import Timing, read
from tests.mpi.launch import HOROVODRUN, ROOT, run_job
from tests.pictures import coloured_pixels

pytest.importorskip("horovod.torch", reason="needs Horovod")
pytest.importorskip("matplotlib", reason="needs the extra [examples]")

SHORT = ["--model", "tiny", "--steps", "1", "--rounds"]


def run(command: list[str], tmp_path: Path) -> str:
    job = run_job(command, cwd=tmp_path)
    assert job.returncode == 0, job.stdout[-5000:] + job.stderr[-5000:]
    return job.stdout


def check(timings: list[Timing], workers: int) -> None:
    """Every method had its turns, and stats() claims what the theory says."""
    assert [timing.method for timing in timings] == [method.name for method in METHODS.values()]
    assert {timing.workers for timing in timings} == {workers}
    assert all(timing.seconds > 0 for timing in timings)
    for timing in timings:
        assert math.isnan(timing.claimed_bytes) is not timing.method.startswith(("sign", "Top-K"))
        if not math.isnan(timing.claimed_bytes):
            assert timing.claimed_bytes == pytest.approx(timing.theory_bytes, rel=1e-4)


@pytest.mark.xdist_group("mpi")
def test_all_methods_side_by_side(tmp_path: Path) -> None:
    script = [
        sys.executable,
        str(ROOT / "benchmarks" / "step.py"),
        *SHORT,
        "1",
        "--out",
        str(tmp_path / "a.csv"),
    ]
    run([HOROVODRUN, "-np", "2", *script], tmp_path)
    check(read(tmp_path / "a.csv"), 2)
    assert "x faster than float32" in (tmp_path / "a.txt").read_text()
    assert coloured_pixels(tmp_path / "a.png") > 100
