"""How tests are spread over processes."""

from __future__ import annotations

from typing import Any

import pytest

STARTS_MPI_JOBS = ("tests/mpi/", "tests/doctor/", "tests/examples/")
"""Folders of tests that start MPI jobs."""


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
