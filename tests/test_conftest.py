"""Tests that start MPI jobs run in one process, however many there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpi.launch import LIMIT

pytest.importorskip("xdist", reason="needs pytest-xdist")

TEST = """
import os, pathlib, time
import pytest

@pytest.mark.parametrize("number", range(6))
def test_something(number):
    time.sleep(0.05)
    pathlib.Path({seen!r}, f"{{os.environ['PYTEST_XDIST_WORKER']}}-{{number}}").touch()
"""


def test_mpi_jobs_stay_in_one_process(tmp_path: Path) -> None:
    (tmp_path / "tests" / "mpi").mkdir(parents=True)
    for where in ("tests", "tests/mpi"):
        (tmp_path / where / "seen").mkdir()
        (tmp_path / where / f"test_{Path(where).name}.py").write_text(
            TEST.format(seen=str(tmp_path / where / "seen"))
        )
    (tmp_path / "tests" / "conftest.py").write_text(Path(__file__).with_name("spreading.py").read_text())
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup", "tests"]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONPATH"))
    }
    job = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert job.returncode == 0, job.stdout + job.stderr
    seen = {path.name for path in (tmp_path / "tests" / "mpi" / "seen").iterdir()}
    assert len(seen) == 6
    assert len({name.split("-")[0] for name in seen}) == 1
    assert len(list((tmp_path / "tests" / "seen").iterdir())) == 6
