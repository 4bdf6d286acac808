"""`import hvd_saef` starts no MPI: what a rank starts may import it, and hvd.init() may come first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.mpi.launch import ENVIRONMENT, LIMIT, MPIRUN, ROOT, run_job

pytest.importorskip("mpi4py", reason="needs mpi4py")
pytest.importorskip("horovod.torch", reason="needs Horovod")


def start(ranks: int, module: str, argument: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [MPIRUN, "-np", str(ranks), sys.executable, "-m", module, argument]
    return run_job(command, environment=environment)


def test_import_loads_neither_horovod_nor_mpi_nor_the_compiler() -> None:
    """The compiler of torch takes as long to load as all the rest: workers of a DataLoader need none."""
    code = "import sys, hvd_saef; print(sorted({'mpi4py', 'horovod', 'torch._dynamo'} & set(sys.modules)))"
    job = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT
    )
    assert job.stdout == "[]\n", job.stderr


FIRST_NUMBER = """
import sys
import torch
import hvd_saef

class Finder:
    def find_spec(self, name, path=None, target=None):
        found.append(name)

found = []
sys.meta_path.insert(0, Finder())
torch.empty(1).uniform_(0.0, 1.0)
print(found)
"""


def test_torch_has_loaded_numpy_before_workers_start() -> None:
    """Older ones look for it with the first number: two threads that do so at once would hang."""
    job = subprocess.run(
        [sys.executable, "-c", FIRST_NUMBER],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert job.stdout == "[]\n", job.stderr


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_loader(method: str) -> None:
    job = start(2, "tests.mpi.loaders", method)
    assert job.returncode == 0, job.stdout[-5000:] + job.stderr[-5000:]
    for rank in range(2):
        for persistent in (False, True):
            assert f"rank {rank}: {method}, {persistent=}" in job.stdout


@pytest.mark.parametrize("how", ["shutdown", "exit", "nodes"])
def test_mpi_does_not_end_under_a_rank_that_is_late(how: str) -> None:
    job = start(4, "tests.mpi.ends", how)
    assert job.returncode == 0, job.stdout[-5000:] + job.stderr[-5000:]
    assert job.stdout.count("comes to its end") == 4


def test_ranks_hear_of_one_that_shut_down_too_early() -> None:
    job = start(4, "tests.mpi.ends", "too_early")
    said = job.stdout + job.stderr
    assert job.returncode != 0, said[-5000:]
    assert "rank 0 ended before" in said
