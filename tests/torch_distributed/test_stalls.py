"""Ranks that are killed, stopped, hang, or end early, in jobs without MPI: the others are told, by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.torch_distributed.launch import Ended, run_ranks

PATIENCE = {"HVD_SAEF_STALL_WARNING_S": "1", "HVD_SAEF_STALL_ABORT_S": "3"}
RANKS = 3
LAST = RANKS - 1


def job(fault: str, folder: Path, lost: int | None = None, **environment: str) -> list[Ended]:
    """What became of each rank; the last has the fault."""
    return run_ranks(RANKS, ["-m", "tests.transport.victim", fault, str(folder)], lost=lost, **environment)


def ends(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("end-*"))]


@pytest.mark.parametrize(("fault", "victim"), [("sigstop", LAST), ("sigstop", 0), ("never-wraps", LAST)])
def test_those_who_wait_name_the_missing_rank_and_end(fault: str, victim: int, tmp_path: Path) -> None:
    """Rank 0, too, whose process serves the store: nobody waits for its answers."""
    ended = job(fault, tmp_path, lost=victim, VICTIM=str(victim), **PATIENCE)
    waiting = [rank for number, rank in enumerate(ended) if number != victim]
    for rank in waiting:
        assert rank.code == 1
        assert "ends the job" in rank.said
        # Whoever gives up first takes its connections along.
        assert re.search(rf"rank {victim} did not arrive|lost a connection", rank.said)
    said = "".join(rank.said for rank in waiting)
    assert re.search(rf"ranks? [0-9, ]*\b{victim}\b[0-9, ]* did not arrive: stopped", said)
    what = "the agreement of all ranks, round 4" if fault == "sigstop" else "hvd_saef.DistributedOptimizer"
    assert re.search(rf"StalledExchangeError: rank \d has waited (?!0|1\.|2\.)\S+ s in {what}", said)
    assert re.search(rf"RuntimeWarning: rank {int(victim == 0)} has waited", said)
    assert ends(tmp_path) == []


def test_a_pause_costs_nothing_but_time(tmp_path: Path) -> None:
    """Warned of, then gone on with: to the bit where a job without it comes to."""
    for fault in ("pause", "none"):
        (tmp_path / fault).mkdir()
        ended = job(fault, tmp_path / fault, HVD_SAEF_STALL_WARNING_S="1")
        assert [rank.code for rank in ended] == RANKS * [0], ended
        said = "".join(rank.said for rank in ended)
        assert (f"rank {LAST} did not arrive" in said) == (fault == "pause")
        assert ("goes on with the agreement of all ranks, round 4 after" in said) == (fault == "pause")
    assert ends(tmp_path / "pause") == ends(tmp_path / "none")
    assert len(ends(tmp_path / "none")) == RANKS
    assert len(set(ends(tmp_path / "none"))) == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("early-end", rf"rank {LAST} ended before the agreement of all ranks, round 4.*common_steps"),
        ("exception", rf"lost a connection in the agreement of all ranks, round 4.*rank {LAST} "),
        ("sigkill", rf"lost a connection in the agreement of all ranks, round 4.*rank {LAST} "),
    ],
)
def test_a_rank_that_is_gone_is_told_of_at_once(fault: str, words: str, tmp_path: Path) -> None:
    """By default, without any setting: it will never come."""
    ended = job(fault, tmp_path)
    assert [rank.code for rank in ended[:LAST]] == LAST * [1]
    assert "did not arrive" not in "".join(rank.said for rank in ended)
    assert any(re.search(words, rank.said) for rank in ended[:LAST]), ended
    if fault == "exception":
        assert "OSError: this rank's disk is gone" in ended[LAST].said
        assert f"rank {LAST} failed and ends the job" in ended[LAST].said
