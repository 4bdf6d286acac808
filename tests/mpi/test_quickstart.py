"""The quick start runs under every launcher that the README names, and writes what it says."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from tests.mpi.launch import HOROVODRUN, MPIRUN, ROOT, run_job
from tests.pictures import coloured_pixels

pytest.importorskip("horovod.torch", reason="needs Horovod")
pytest.importorskip("mlxtend", reason="needs the extra [examples]")

LAUNCHERS = {
    "python": (1, []),
    "mpirun": (2, [MPIRUN, "-np", "2"]),
    "horovodrun": (3, [HOROVODRUN, "-np", "3"]),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(launcher: str, tmp_path: Path) -> None:
    ranks, command = LAUNCHERS[launcher]
    script = [sys.executable, str(ROOT / "benchmarks" / "quickstart.py")]
    options = ["--epochs", "1", "--cut", "1", "--output", str(tmp_path)]
    job = run_job([*command, *script, *options], cwd=tmp_path)
    assert job.returncode == 0, job.stdout[-5000:] + job.stderr[-5000:]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["method"] for row in rows] == [
        "SGDM",
        "EF-SignSGDM-DC",
        "SAEF-SignSGDM-DC",
        "SAEF-SignSGDM-DC beta=1",
    ]
    assert all(0 < float(row["training_loss"]) < 2.3 for row in rows)  # log 10: has learned something
    assert (float(rows[2]["bytes_sent"]) > 0) is (ranks > 1)
    assert float(rows[2]["bytes_sent"]) * 10 * ranks <= float(rows[0]["bytes_sent"])
    assert coloured_pixels(tmp_path / "quickstart.png") > 50  # one epoch: dots
    assert "Training loss at x" in (tmp_path / "summary.txt").read_text()
