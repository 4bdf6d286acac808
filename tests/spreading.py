"""How tests are spread over processes."""

from __future__ import annotations

from typing import Any

import pytest

GROUPS = {"mpi": ("tests/mpi/", "tests/doctor/", "tests/examples/"), "gloo": ("tests/torch_distributed/",)}
"""Folders of tests that start jobs, many tests one job together. Each group is for one process."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's, with all tests of a group one after another, in one process.

    Not by xdist_group marks: xdist 3.8 forgets them under pytest 9.2 (pytest-dev/pytest-xdist#1386).
    """
    if config.getvalue("dist") not in ("load", "loadgroup"):
        return None
    from xdist.scheduler import LoadGroupScheduling

    class Scheduling(LoadGroupScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return next((name for name, folders in GROUPS.items() if nodeid.startswith(folders)), nodeid)

    return Scheduling(config, log)
