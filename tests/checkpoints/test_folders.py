"""The folder of a checkpoint: what is not this optimizer's stays, and all ranks see the same one."""

from __future__ import annotations

import gc
import re
from pathlib import Path
from typing import Any

import pytest

from hvd_saef import CheckpointError, save_checkpoint
from hvd_saef.checkpoints.manifest import file_of
from tests.checkpoints.test_checkpoint import Job
from tests.workers import caught, together

pytestmark = pytest.mark.filterwarnings("ignore:the largest block")

STRANGERS = [
    "step100-rank0.pt",
    "step-final-rank-best.pt",
    "step00000002-deadbeef-rank00000.pt.bak",
    "step00000002-DEADBEEF-rank00000.pt",
    "my-step00000002-deadbeef-rank00000.pt",
    "step00000002-deadbeef-rank00000-best.pt",
    "step2-deadbeef-rank0.pt",
    "step_rank.pt",
    ".step.tmp",
    ".step00000002-deadbeef-rank00000.pt.tmp",
    ".manifest.json.backup.tmp",
    "manifest.json.bak",
    "epoch3.pt",
]
LEFT_BEHIND = [
    "step00000002-deadbeef-rank00000.pt",
    "step123456789-0badcafe-rank123456.pt",
    ".step00000002-deadbeef-rank00000.pt.0123abcd.tmp",
    ".manifest.json.0123abcd.tmp",
]


def test_only_files_of_our_exact_names_are_deleted(tmp_path: Path) -> None:
    for name in STRANGERS + LEFT_BEHIND:
        (tmp_path / name).write_text(name)

    def fn(rank: int) -> None:
        job = Job(rank).step(1).save(tmp_path).step(1).save(tmp_path)
        assert job.load(tmp_path).taken == 2

    together(2, fn)
    names = {path.name for path in tmp_path.iterdir()}
    assert names.issuperset(STRANGERS)
    assert not names.intersection(LEFT_BEHIND)
    assert len(names) == len(STRANGERS) + 3
    for name in STRANGERS:
        assert (tmp_path / name).read_text() == name


def test_a_folder_of_our_name_stays(tmp_path: Path) -> None:
    (tmp_path / file_of(7, "deadbeef", 0)).mkdir()
    together(1, lambda rank: Job(rank).step(1).save(tmp_path).step(1).save(tmp_path))
    assert (tmp_path / file_of(7, "deadbeef", 0)).is_dir()


def test_another_optimizers_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    """Two optimizers of one job, with the same names and shapes even: each needs its own folder."""

    def fn(rank: int) -> None:
        one, other = Job(rank), Job(rank, seed=1)
        one.step(2).save(tmp_path)
        try:
            other.step(3).save(tmp_path)
        finally:
            assert one.load(tmp_path).taken == 2
            one.step(1).save(tmp_path)
            other.save(tmp_path / "other")
            assert one.load(tmp_path).taken == 3

    for failure in caught(2, fn):
        assert isinstance(failure, CheckpointError), repr(failure)
        assert re.search(
            "rank 0: .*holds the checkpoint of another optimizer.*a folder of its own", str(failure)
        ), str(failure)


@pytest.mark.parametrize("how", ["dropped", "wrapped again"])
def test_a_later_optimizer_may_replace_it(how: str, tmp_path: Path) -> None:
    def fn(rank: int) -> None:
        job: Any = Job(rank).step(2).save(tmp_path)
        if how == "dropped":
            job = None
            gc.collect()
            job = Job(rank, seed=1)
        else:
            from hvd_saef import DistributedOptimizer

            job.optimizer = DistributedOptimizer(
                job.inner, job.model.named_parameters(), model=job.model, block_size=4
            )
        job.taken = 5
        assert job.save(tmp_path).load(tmp_path).taken == 5

    together(2, fn)


def test_folders_that_differ_between_ranks(tmp_path: Path) -> None:
    """As on hosts that share no disk, or with the time of day in the name."""

    def fn(rank: int) -> None:
        Job(rank).step(1).save(tmp_path / f"of rank {rank}")

    for failure in caught(2, fn):
        assert isinstance(failure, CheckpointError), repr(failure)
        assert re.search(r"rank00001\.pt was written, but rank 0 does not see it", str(failure)), str(failure)


def test_no_path_on_some_ranks(tmp_path: Path) -> None:
    def fn(rank: int, load: bool) -> None:
        job = Job(rank)
        path: Any = tmp_path if rank == 0 else None
        if load:
            job.load(path)
        else:
            save_checkpoint(path, job.model, job.optimizer)

    for load in (False, True):
        for failure in caught(2, lambda rank, load=load: fn(rank, load)):  # type: ignore[misc]
            assert isinstance(failure, CheckpointError), repr(failure)
            assert re.search("rank 1: TypeError", str(failure)), str(failure)
