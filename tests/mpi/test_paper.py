"""The paper's runner under mpirun: as with threads, but for how means round; killed and resumed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import astuple
from pathlib import Path

import pytest

from benchmarks.paper.rows import Row, read
from tests.mpi.launch import ENVIRONMENT, LIMIT, MPIRUN, ROOT

pytest.importorskip("horovod.torch", reason="needs Horovod")
pytest.importorskip("mlxtend", reason="needs the extra [examples]")


RANKS = (MPIRUN, "-np", "4")
CSV = Path("digits", "SAEF-SignSGDM-DC-seed0.csv")


def start(folder: Path, *launcher: str) -> subprocess.Popen[str]:
    """One run of the digits preset, by the ranks that a launcher starts or by threads."""
    command = [*launcher, sys.executable, "-W", "ignore", *(["-m", "mpi4py"] if launcher else [])]
    command += ["-m", "benchmarks.paper", "run", "digits", *(["--mpi"] if launcher else [])]
    command += ["--seeds", "0", "--methods", "SAEF-SignSGDM-DC", "--out", str(folder)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(job: subprocess.Popen[str], folder: Path) -> list[Row]:
    """Its rows, when it has ended well."""
    said, _ = job.communicate(timeout=LIMIT)
    assert job.returncode == 0, said[-5000:]
    return read(folder / CSV)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run under mpirun that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert len(finish(start(folder, *RANKS), folder)) == 3
    return folder


def test_as_with_threads(undisturbed: Path, tmp_path: Path) -> None:
    ranks, threads = read(undisturbed / CSV), finish(start(tmp_path), tmp_path)
    assert len(threads) == 3
    for one, other in zip(ranks, threads, strict=True):
        assert (one.method, one.epoch, one.bytes_sent) == (other.method, other.epoch, other.bytes_sent)
        assert astuple(one)[4:] == pytest.approx(astuple(other)[4:], rel=1e-3, abs=2e-3)


def test_killed_and_resumed(undisturbed: Path, tmp_path: Path) -> None:
    """In the second epoch and in the third: the same CSV, to the byte, as undisturbed."""
    for epochs in (1, 2):
        job = start(tmp_path, *RANKS)
        while len(read(tmp_path / CSV)) < epochs and job.poll() is None:
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)  # mpirun kills its ranks
        said, _ = job.communicate(timeout=LIMIT)
        rows = len(read(tmp_path / CSV))
        assert rows >= epochs, said
        assert job.returncode != 0 or rows == 3, said  # it may have been faster than the signal
    finish(start(tmp_path, *RANKS), tmp_path)
    assert (tmp_path / CSV).read_bytes() == (undisturbed / CSV).read_bytes()
    assert [path.name for path in (tmp_path / "digits").iterdir()] == [CSV.name]
