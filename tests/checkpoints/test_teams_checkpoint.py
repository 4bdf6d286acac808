"""Checkpoints of workers of several ranks: a file a worker, exact, with what each rank has of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hvd_saef import CheckpointError, load_checkpoint, run_workers, save_checkpoint
from tests import workers
from tests.workers import bits

pytestmark = pytest.mark.filterwarnings("ignore:the largest block")


class Job(workers.Job):
    """With running statistics."""

    def __init__(self, rank: int, seed: int = 0, worker: str = "node", **options: Any) -> None:
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        super().__init__(rank, model, seed=seed, block_size=4, worker=worker, **options)

    def everything(self) -> dict[str, bytes]:
        """All bits of the model's tensors where they are, the optimizer's and ours."""
        held = {"held": dict(self.model.named_parameters()), "buffers": dict(self.model.named_buffers())}
        return bits(held | {"optimizer": self.optimizer.state_dict()})


def save(job: Job, path: Path) -> None:
    """With something of the rank's own."""
    save_checkpoint(path, job.model, job.optimizer, rank=job.rank, seed=torch.tensor([job.rank]))


@pytest.mark.parametrize("options", [{}, {"local_steps": 3, "averaging_period": 2}], ids=str)
def test_resumed_equals_uninterrupted(options: dict[str, Any], tmp_path: Path) -> None:
    def fn(rank: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
        job = Job(rank, **options).step(5)
        save(job, tmp_path)
        resumed = Job(rank, seed=1 + rank, **options)
        extra = load_checkpoint(tmp_path, resumed.model, resumed.optimizer)
        assert (extra["rank"], extra["seed"].item()) == (rank, rank)
        resumed.taken = 5
        return job.step(4).everything(), resumed.step(4).everything()

    found = run_workers(2, fn, ranks=2)
    for uninterrupted, resumed in found:
        assert resumed == uninterrupted
    assert len({together["buffers/1.running_mean"] for together, _ in map(_paths, found)}) == 4
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["workers"] == len(manifest["files"]) == len(list(tmp_path.glob("*.pt"))) == 2


def _paths(pair: tuple[dict[str, bytes], dict[str, bytes]]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    first, second = pair
    return {path.lstrip("/"): leaf for path, leaf in first.items()}, second


@pytest.mark.filterwarnings("ignore:.*on_mismatch")
def test_other_numbers_of_workers_and_of_ranks(tmp_path: Path) -> None:
    def before(rank: int) -> dict[str, Any]:
        job = Job(rank, weights="ranks").step(5)
        save(job, tmp_path)
        state: dict[str, Any] = job.optimizer.state_dict()["hvd_saef"]
        return state

    states = run_workers(2, before, ranks=[1, 3])

    def as_many_workers(rank: int) -> dict[str, bytes]:
        job = Job(rank, seed=1, worker="rank")
        assert load_checkpoint(tmp_path, job.model, job.optimizer)["rank"] == rank
        return bits(job.optimizer.state_dict()["hvd_saef"]["errors"])

    one, other = states[0]["errors"], states[1]["errors"]
    assert run_workers(2, as_many_workers) == [bits(one), bits(other)]

    def fewer(rank: int) -> Any:
        job = Job(rank, seed=1)
        with pytest.raises(CheckpointError, match="saved by 2 workers, and there are 1"):
            load_checkpoint(tmp_path, job.model, job.optimizer)
        load_checkpoint(tmp_path, job.model, job.optimizer, on_mismatch="redistribute")
        return job.optimizer.state_dict()["hvd_saef"]["errors"]

    for errors in run_workers(1, fewer, ranks=2):
        for name, error in errors.items():  # weighted as the workers were
            torch.testing.assert_close(error, (one[name] + 3 * other[name]) / 4)
            assert not torch.allclose(error, (one[name] + other[name]) / 2)
