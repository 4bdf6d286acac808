"""How tests are spread over processes (pytest -n): MPI jobs one after another, in one of them."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """xdist's, with all of tests/mpi in one group.

    Not by xdist_group marks: xdist 3.8 forgets them under pytest 9.2 (pytest-dev/pytest-xdist#1386).
    """
    if config.getvalue("dist") not in ("load", "loadgroup"):
        return None
    from xdist.scheduler import LoadGroupScheduling

    class Scheduling(LoadGroupScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "mpi" if "tests/mpi/" in nodeid else nodeid

    return Scheduling(config, log)
