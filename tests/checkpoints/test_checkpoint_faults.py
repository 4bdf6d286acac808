"""Checkpoints under fire: processes killed while they save, full and read-only disks, damaged files."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_saef import CheckpointError
from hvd_saef.checkpoints.manifest import FORMAT, MANIFEST, describe, sealed
from tests.checkpoints.test_checkpoint import Job
from tests.mpi.launch import ENVIRONMENT, LIMIT, ROOT
from tests.workers import together

pytestmark = pytest.mark.filterwarnings("ignore:the largest block")


def test_processes_killed_while_they_save() -> None:
    """`python -m tests.saver 200` does the same for longer."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.saver", "15"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert counts["loaded"] == counts["kills"] == 15, done.stderr
    assert counts["left behind"] > 0  # they were killed in the middle of it


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def saving_fails(folder: Path, words: str, width: int = 5) -> None:
    """Save well; then not, named on all workers; then what was there loads, and nothing else is there."""

    def good(rank: int) -> None:
        Job(rank, width=width).step(2).save(folder)

    def bad(rank: int) -> None:
        job = Job(rank, width=width).step(4)
        with pytest.raises(CheckpointError, match=words):
            job.save(folder)
        job.step()  # and training can go on

    def load(rank: int) -> None:
        assert Job(rank, width=width).load(folder).taken == 2

    if not (folder / MANIFEST).exists():
        together(2, good)
        return
    before = sorted(path.name for path in folder.iterdir())
    together(2, bad)
    assert sorted(path.name for path in folder.iterdir()) == before
    together(2, load)


def test_a_full_disk(small_disk: Path) -> None:
    saving_fails(small_disk, "", width=1500)
    saving_fails(small_disk, r"rank .*rank0000\d\.pt cannot be written.*(No space|disk is full)", width=1500)


def test_a_read_only_folder(small_disk: Path) -> None:
    saving_fails(small_disk, "")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    saving_fails(small_disk, r"rank 0: .*\.pt cannot be written.*Read-only")


def corrupt(path: Path, how: str, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    elif how == "truncated":
        del content[generator.randrange(len(content)) :]
    else:
        content += b"\n"
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["bit", "truncated", "longer"])
@pytest.mark.parametrize("what", [MANIFEST, "rank"])
def test_every_damaged_bit_is_found(what: str, how: str, tmp_path: Path) -> None:
    """At random places: the error names the file, and nothing changes."""
    together(2, lambda rank: Job(rank).step(2).save(tmp_path) and None)
    (path,) = [path for path in tmp_path.iterdir() if path.name == what or f"{what}00001" in path.name]
    whole, generator = path.read_bytes(), random.Random(7)

    def fn(rank: int) -> None:
        job = Job(rank, seed=3).step()
        before = job.everything()
        for _ in range(20):
            if rank == 0:
                path.write_bytes(whole)
                corrupt(path, how, generator)
            job.optimizer._saef.communicator.combine(0)
            with pytest.raises(CheckpointError, match=path.name):
                job.load(tmp_path)
            assert job.everything() == before
            job.optimizer._saef.communicator.combine(0)

    together(2, fn)


class Stranger:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["HVD_SAEF_TEST_STRANGER"],)


def test_a_strangers_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "code ran"
    monkeypatch.setenv("HVD_SAEF_TEST_STRANGER", str(trace))
    folder = tmp_path / "checkpoint"
    together(1, lambda rank: Job(rank).step(2).save(folder) and None)
    manifest = json.loads((folder / MANIFEST).read_text())
    path = folder / manifest["files"][0]["name"]
    torch.save({"format": FORMAT, "extra": Stranger()}, path)
    manifest["files"][0] = describe(path)
    (folder / MANIFEST).write_bytes(sealed(manifest))
    with pytest.raises(CheckpointError, match="eights"):
        together(1, lambda rank: Job(rank).load(folder) and None)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Stranger()))  # the counter-test
    assert trace.exists()


def test_files_of_another_run(tmp_path: Path) -> None:
    """A manifest copied over another run's files does not take them for its own."""
    together(2, lambda rank: Job(rank).step(2).save(tmp_path / "one") and None)
    together(2, lambda rank: Job(rank).step(2).save(tmp_path / "other") and None)
    (tmp_path / "one" / MANIFEST).write_bytes((tmp_path / "other" / MANIFEST).read_bytes())
    with pytest.raises(CheckpointError, match=r"rank00000\.pt is missing"):
        together(2, lambda rank: Job(rank).load(tmp_path / "one") and None)
