"""Checkpoints: exact for the same workers, explicit for others, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_saef import CheckpointError, Compression, load_checkpoint, save_checkpoint
from hvd_saef.checkpoints.manifest import sealed
from tests import workers
from tests.workers import bits, caught, together

pytestmark = pytest.mark.both_arithmetics

SETTINGS: dict[str, dict[str, Any]] = {
    "sharded": {},
    "replicated": {"server": "replicated", "server_step_ahead": 1.0},
    "ef, single-way": {"feedback": "ef", "double_compression": False},
    "in a round": {"local_steps": 4, "averaging_period": 2},
    "topk": {"compression": Compression.topk(0.2), "averaging_period": 3},
    "dense": {"compression": Compression.none, "feedback": "none"},
}


class Job(workers.Job):
    """With running statistics, and files."""

    def __init__(self, rank: int, seed: int = 0, width: int = 5, **options: Any) -> None:
        model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
        super().__init__(rank, model, seed=seed, block_size=4, **options)

    def save(self, path: Path) -> Job:
        """Save with a number and a tensor more."""
        save_checkpoint(path, self.model, self.optimizer, taken=self.taken, seed=torch.tensor([self.rank]))
        return self

    def load(self, path: Path, **options: Any) -> Job:
        """Load and remember the number."""
        self.taken = load_checkpoint(path, self.model, self.optimizer, **options)["taken"]
        return self

    def everything(self) -> dict[str, bytes]:
        """All bits of the model's tensors where they are, the optimizer's and ours."""
        held = {"held": dict(self.model.named_parameters()), "buffers": dict(self.model.named_buffers())}
        return bits(held | {"optimizer": self.optimizer.state_dict()})


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_resumed_equals_uninterrupted(workers: int, options: dict[str, Any], tmp_path: Path) -> None:
    def fn(rank: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
        job = Job(rank, **options).step(3).save(tmp_path).step(2).save(tmp_path)
        resumed = Job(rank, seed=1 + rank, **options).load(tmp_path)
        assert resumed.taken == 5
        return job.step(4).everything(), resumed.step(4).everything()

    for uninterrupted, resumed in together(workers, fn):
        assert resumed == uninterrupted
    assert len(list(tmp_path.iterdir())) == workers + 1  # the first set is gone


def test_loading_goes_back_within_a_job(tmp_path: Path) -> None:
    def fn(rank: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
        job = Job(rank).step(3).save(tmp_path)
        first = job.step(3).everything()
        return first, job.load(tmp_path).step(3).everything()

    for first, again in together(3, fn):
        assert again == first


def auxiliary(jobs: list[Job]) -> list[Tensor]:
    """x̃ = x - (s + mean e) of some workers at a round's start, and the mean of Adam's first moment."""
    states = [job.optimizer.state_dict()["hvd_saef"] for job in jobs]
    found = []
    for i, name in enumerate(states[0]["x"]):
        served = torch.zeros(states[0]["x"][name].numel())
        for state in states:
            if name in state["server_errors"]:
                piece = state["server_errors"][name]
                served[piece["start"] : piece["start"] + piece["values"].numel()] = piece["values"]
        error = torch.stack([state["errors"][name] for state in states]).mean(0)
        found.append(states[0]["x"][name] - served.view_as(error) - error)
        parameters = [list(job.model.parameters())[i] for job in jobs]
        moments = [job.inner.state[p]["exp_avg"] for job, p in zip(jobs, parameters, strict=True)]
        found.append(torch.stack(moments).mean(0))
    return found


@pytest.mark.filterwarnings("ignore:.*on_mismatch:UserWarning")
@pytest.mark.parametrize("name", ["sharded", "replicated", "ef, single-way", "topk"])
@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 4), (4, 1), (1, 3)])
def test_redistribute_keeps_x_tilde(name: str, before: int, after: int, tmp_path: Path) -> None:
    options = SETTINGS[name]
    if name == "sharded" and after < 3:
        options = options | {"server": "sharded"}
    old = together(before, lambda rank: Job(rank, **options).step(5).save(tmp_path))
    expected = auxiliary(old)

    def fn(rank: int) -> Job:
        job = Job(rank, seed=1 + rank, **options)
        with pytest.raises(CheckpointError, match=f"saved by {before} workers, and there are {after}"):
            job.load(tmp_path)
        return job.load(tmp_path, on_mismatch="redistribute")

    new = together(after, fn)
    for found, wanted in zip(auxiliary(new), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*on_mismatch:UserWarning")
@pytest.mark.parametrize("on_mismatch", ["redistribute", "reset"])
def test_training_goes_on_with_other_workers(on_mismatch: Any, tmp_path: Path) -> None:
    x = together(3, lambda rank: Job(rank).step(4).save(tmp_path))[0].optimizer.state_dict()["hvd_saef"]["x"]

    def fn(rank: int) -> dict[str, Tensor]:
        job = Job(rank, seed=1 + rank).load(tmp_path, on_mismatch=on_mismatch)
        loaded = job.optimizer.state_dict()["hvd_saef"]
        assert all(torch.equal(loaded["x"][name], x[name]) for name in x)
        assert job.optimizer.stats()["rounds"] == 4
        if on_mismatch == "reset":
            assert job.optimizer.stats()["error_norm"] == 0
            assert not job.inner.state
        job.step(3)
        found: dict[str, Tensor] = job.optimizer.state_dict()["hvd_saef"]["x"]
        return found

    first, *others = together(4, fn)
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


def spoil(folder: Path, how: str) -> str:
    """Damage the checkpoint; returns what the error must name."""
    file = sorted(folder.glob("step*-rank00001.pt"))[0]
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "flipped":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
        return "manifest.json"
    elif how == "broken manifest":
        (folder / "manifest.json").write_text('{"format": ')
        return "manifest.json"
    elif how == "foreign manifest":
        (folder / "manifest.json").write_text('{"format": "other"}')
        return "manifest.json"
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][1]["name"] = f"../{folder.name}/{file.name}"
        (folder / "manifest.json").write_bytes(sealed(manifest))
        return "outside its folder"
    return file.name


DAMAGES = [
    "missing",
    "truncated",
    "flipped",
    "no manifest",
    "broken manifest",
    "foreign manifest",
    "escaping",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_named_and_changes_nothing(how: str, tmp_path: Path) -> None:
    together(2, lambda rank: Job(rank).step(3).save(tmp_path))
    named = spoil(tmp_path, how)

    def fn(rank: int) -> None:
        job = Job(rank, seed=5).step(2)
        before = job.everything()
        try:
            job.load(tmp_path)
        finally:
            assert job.everything() == before
            job.step()

    for failure in caught(2, fn):
        assert isinstance(failure, CheckpointError), repr(failure)
        assert named in str(failure)


@pytest.mark.filterwarnings("ignore:.*on_mismatch:UserWarning")
def test_a_lost_file_can_be_done_without(tmp_path: Path) -> None:
    together(3, lambda rank: Job(rank).step(3).save(tmp_path))
    spoil(tmp_path, "missing")

    def fn(rank: int) -> dict[str, Tensor]:
        job = Job(rank, seed=5).load(tmp_path, on_mismatch="redistribute").step(3)
        found: dict[str, Tensor] = job.optimizer.state_dict()["hvd_saef"]["x"]
        return found

    first, *others = together(3, fn)
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


def test_another_model_is_refused(tmp_path: Path) -> None:
    together(2, lambda rank: Job(rank).step(1).save(tmp_path))

    def fn(rank: int) -> None:
        Job(rank, width=6).load(tmp_path)

    for failure in caught(2, fn):
        assert isinstance(failure, CheckpointError), repr(failure)
        assert "parameter ('0.bias', [5], 'torch.float32') is in the checkpoint only" in str(failure)


def test_what_cannot_be_written_is_named_and_the_old_set_stays(tmp_path: Path) -> None:
    def fn(rank: int) -> None:
        job = Job(rank).step(2).save(tmp_path)
        before = sorted(path.name for path in tmp_path.iterdir())
        try:
            save_checkpoint(tmp_path, job.model, job.optimizer, odd=(lambda: 0) if rank == 1 else None)
        finally:
            assert len(before) == 3
            again = Job(rank, seed=3).load(tmp_path)
            assert again.step(2).everything() == job.step(2).everything()

    for failure in caught(2, fn):
        assert isinstance(failure, CheckpointError), repr(failure)
        assert "rank 1" in str(failure)
    assert len(list(tmp_path.iterdir())) == 3


def test_bad_arguments(tmp_path: Path) -> None:
    def fn(rank: int) -> None:
        job = Job(rank)
        with pytest.raises(ValueError, match=r"on_mismatch='drop': 'error', 'redistribute' and 'reset'"):
            job.load(tmp_path, on_mismatch="drop")
        with pytest.raises(TypeError, match=r"optimizer=AdamW: what hvd_saef.DistributedOptimizer returned"):
            save_checkpoint(tmp_path, job.model, job.inner)

    together(1, fn)


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        (["error", "reset"], CheckpointError, "on_mismatch is not the same on all ranks: 'error' on rank 0"),
        (["error", "drop"], ValueError, "on_mismatch='drop': 'error', 'redistribute' and 'reset'"),
    ],
)
def test_ranks_that_ask_for_different_things(
    values: list[Any], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    """All are told, where some went on into a collective without the others."""
    together(3, lambda rank: Job(rank).step(1).save(tmp_path) and None)

    def fn(rank: int) -> None:
        Job(rank).load(tmp_path, on_mismatch=values[rank])

    for failure in caught(2, fn):
        assert isinstance(failure, kind), repr(failure)
        assert words in str(failure)
