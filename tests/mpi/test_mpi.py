"""Runs tests/mpi/checks.py by mpirun with 1 to 4 ranks, once on the twins, and quick jobs by horovodrun."""

from __future__ import annotations

import os
import shutil
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests import without
from tests.mpi.launch import ENVIRONMENT, HOROVODRUN, MPIRUN, ROOT, run_job
from tests.transport.checks import reports

pytest.importorskip("mpi4py", reason="needs mpi4py")
pytest.importorskip("horovod.torch", reason="needs Horovod")
if shutil.which("mpirun", path=ENVIRONMENT["PATH"]) is None:
    pytest.skip("needs mpirun on the PATH", allow_module_level=True)

from tests.mpi import nodes
from tests.mpi.checks import CHECKS


@cache
def report(
    ranks: int,
    arithmetic: str = "kernels",
    module: str = "tests.mpi.checks",
    only: str = "",
    **more: str,
) -> dict[str, list[str]]:
    """What failed in a job of `ranks` ranks, check by check (or in one of them); run once a process."""
    output = Path(mkdtemp()) / "report"
    command = [
        MPIRUN,
        "-np",
        str(ranks),
        sys.executable,
        "-m",
        "mpi4py",
        "-m",
        module,
        str(output),
        *([only] if only else []),
    ]
    environment = more | ({"HVD_SAEF_KERNELS": "twins"} if arithmetic == "twins" else {})
    job = run_job(command, environment=environment)
    assert job.returncode == 0, job.stdout[-5000:] + job.stderr[-5000:]
    return reports(output, ranks)


@pytest.mark.parametrize(
    ("ranks", "arithmetic"), [*((ranks, "kernels") for ranks in (1, 2, 3, 4)), (2, "twins")]
)
@pytest.mark.parametrize("name", [*CHECKS, "after_the_end_a_step_says_so"])
def test_check(name: str, ranks: int, arithmetic: str) -> None:
    alone = without.NAME in os.environ  # what is broken may hang in another check
    assert report(ranks, arithmetic, only=name if alone else "")[name] == []


@pytest.mark.parametrize("ranks", [4, 6])
@pytest.mark.parametrize("name", nodes.CHECKS)
def test_nodes(name: str, ranks: int) -> None:
    assert report(ranks, module="tests.mpi.nodes")[name] == []


@pytest.mark.parametrize("name", nodes.CHECKS)
def test_nodes_whose_process_sets_are_added(name: str) -> None:
    assert report(6, module="tests.mpi.nodes", HOROVOD_DYNAMIC_PROCESS_SETS="1")[name] == []


@pytest.mark.parametrize("launcher", [MPIRUN, HOROVODRUN])
def test_a_rank_that_fails_ends_the_job(launcher: str) -> None:
    command = [launcher, "-np", "3", sys.executable, "-m", "tests.transport.crash"]
    job = run_job(command)
    assert job.returncode != 0
    said = job.stdout + job.stderr
    assert "OSError: this rank's disk is gone" in said
    assert "rank 1 failed and ends the job" in said


def test_import_from_the_folder_above_the_clone(tmp_path: Path) -> None:
    (tmp_path / "hvd_saef").symlink_to(ROOT)
    command = [sys.executable, "-c", "import hvd_saef; print(hvd_saef.DistributedOptimizer.__name__)"]
    job = run_job(command, cwd=tmp_path)
    assert job.stdout == "DistributedOptimizer\n", job.stderr
