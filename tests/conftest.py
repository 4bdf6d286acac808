"""What all tests share: the kernels and the twins in turn, and how tests are spread over processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from hvd_saef import kernels

BOTH = {
    f"test_{name}"
    for name in (
        "averaging",
        "checkpoint",
        "compression",
        "compressor",
        "invariants",
        "modes",
        "oracle",
        "overlap",
        "precision",
        "resume",
        "simulation",
    )
}
"""Files of tests about the arithmetic and its bits: they run with the kernels and on the twins."""

STARTS_MPI_JOBS = ("tests/mpi/", "tests/doctor/", "tests/examples/")
"""Folders of tests that start MPI jobs."""


@pytest.fixture(scope="module", autouse=True)
def arithmetic(request: pytest.FixtureRequest) -> Iterator[str]:
    """With the kernels, as they are here; or on the twins: "kernels" or "twins"."""
    chosen: str = getattr(request, "param", "kernels")
    with pytest.MonkeyPatch.context() as patch:
        if chosen == "twins":
            patch.setattr(kernels, "native", None)
            patch.setattr(kernels, "_reason", "")  # no accident: no warning
        yield chosen


@pytest.fixture(scope="module", autouse=True)
def one_core(request: pytest.FixtureRequest, worker_id: str) -> Iterator[None]:
    """Workers that are threads hand over nearly twice as fast on one core: each process takes its own."""
    cores = sorted(os.sched_getaffinity(0))
    threads = request.module.__name__.rpartition(".")[2] in BOTH
    if threads and worker_id != "master":
        os.sched_setaffinity(0, {cores[int(worker_id.removeprefix("gw")) % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Both kinds of arithmetic for the files named above, where the kernels are built."""
    if metafunc.module.__name__.rpartition(".")[2] in BOTH and kernels.native is not None:
        metafunc.parametrize("arithmetic", ["kernels", "twins"], indirect=True, scope="module")


@pytest.fixture(params=kernels.native.instruction_sets() if kernels.native else [])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each that this CPU has; skipped where the kernels are not built."""
    before = kernels.native.set_instruction_set(request.param)
    yield request.param
    kernels.native.set_instruction_set(before)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's, with all tests of MPI jobs in one group: these run one after another, in one process.

    Not by xdist_group marks: xdist 3.8 forgets them under pytest 9.2 (pytest-dev/pytest-xdist#1386).
    """
    if config.getvalue("dist") not in ("load", "loadgroup"):
        return None
    from xdist.scheduler import LoadGroupScheduling

    class Scheduling(LoadGroupScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "mpi" if nodeid.startswith(STARTS_MPI_JOBS) else nodeid

    return Scheduling(config, log)
