"""Runs tests/torch_distributed/checks.py with 2 to 4 ranks, and the launcher torchrun."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests import without
from tests.torch_distributed.checks import CHECKS, TEAM_CHECKS
from tests.torch_distributed.launch import run_ranks, torchrun
from tests.transport.checks import reports

END = "after_the_end_a_step_says_so"


@cache
def report(ranks: int, only: str = "") -> dict[str, list[str]]:
    """What failed in a job of `ranks` ranks, check by check (or in one of them); run once a process."""
    output = Path(mkdtemp()) / "report"
    arguments = ["-m", "tests.torch_distributed.checks", str(output), *([only] if only else [])]
    for ended in run_ranks(ranks, arguments):
        assert ended.code == 0, ended.said[-5000:]
    return reports(output, ranks)


@pytest.mark.parametrize(
    ("ranks", "name"),
    [(ranks, name) for ranks in (2, 3, 4) for name in [*CHECKS, *(TEAM_CHECKS if ranks == 4 else {}), END]],
)
def test_check(ranks: int, name: str) -> None:
    alone = without.NAME in os.environ  # what is broken may hang in another check
    assert report(ranks, only=name if alone else "")[name] == []


def test_a_rank_that_fails_ends_the_job() -> None:
    job = torchrun(3, ["-m", "tests.transport.crash"])
    assert job.returncode != 0
    said = job.stdout + job.stderr
    assert "OSError: this rank's disk is gone" in said
    assert "rank 1 failed and ends the job" in said
