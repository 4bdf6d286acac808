"""The paper's experiments: names, schedules, runs that are killed and resumed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import hvd_saef
from benchmarks.paper import data, training
from benchmarks.paper.methods import parse
from benchmarks.paper.networks import resnet50, resnet_cifar
from benchmarks.paper.presets import CIFAR100, DECODER, IMAGENET, PRESETS, Piece
from benchmarks.paper.rows import Row, read, write
from benchmarks.paper.training import Run, load
from tests.benchmarks.test_paper_data import write_cifar100
from tests.without import LIMIT
from tests.workers import together

ROOT = Path(__file__).resolve().parents[2]


# -- names -----------------------------------------------------------------------------------------


def test_names() -> None:
    assert dict(parse("SGDM").arguments) == {
        "feedback": "none",
        "compression": hvd_saef.Compression.none,
    }
    assert dict(parse("EF-SignSGDM-DC").arguments) == {
        "feedback": "ef",
        "double_compression": True,
        "compression": hvd_saef.Compression.sign,
    }
    method = parse("SAEF-SGD-SC-TopK0.5% p=16 H=4 rate=2")
    assert (method.optimizer, method.rate, method.local_steps, method.feeds_back) == ("SGD", 2.0, 4, True)
    assert dict(method.arguments) == {
        "feedback": "saef",
        "double_compression": False,
        "compression": hvd_saef.Compression.topk(0.005),
        "averaging_period": 16,
        "local_steps": 4,
    }
    assert dict(parse("SAEF-SignAdamW-DC beta=1").arguments)["server_step_ahead"] == 1.0
    assert dict(parse("Local-AdamW").arguments) == {
        "feedback": "ef",
        "compression": hvd_saef.Compression.none,
    }
    control = parse("GradientEF-SignAdamW-SC")
    assert control.arguments == parse("AdamW").arguments
    assert (control.gradients, control.feeds_back) == (hvd_saef.Compression.sign, False)


@pytest.mark.parametrize(
    "name",
    [
        "Sign",
        "SAEF-SGDM",
        "SAEF-SGDM-DC",
        "SignSGDM",
        "SGDM-DC",
        "EF-SignSGDM-DC-TopK1%",
        "Local-SignSGDM-DC",
        "GradientEF-SignSGDM-DC",
        "GradientEF-SGDM",
        "SGDM q=1",
        "sgdm",
    ],
)
def test_wrong_names(name: str) -> None:
    with pytest.raises(ValueError, match="method '"):
        parse(name)


def test_presets() -> None:
    """Every name is one, no two runs share a file, and the paper's schedules are as it says."""
    for preset in PRESETS.values():
        pieces = list(preset.pieces())
        files = {piece.file(Path("out")) for piece in pieces}
        assert len(files) == len(set(pieces)) == len(pieces)
        assert all(piece.task.batch % piece.task.workers == 0 for piece in pieces)
    assert (CIFAR100.epochs, CIFAR100.cuts, CIFAR100.batch, CIFAR100.rate) == (200, (100, 150), 128, 0.1)
    assert (IMAGENET.epochs, IMAGENET.cuts, IMAGENET.batch) == (90, (30, 60), 256)
    assert sum(p.numel() for p in resnet50(1000).parameters()) == 25_557_032
    assert sum(p.numel() for p in resnet_cifar(56, 100).parameters()) == pytest.approx(0.86e6, rel=0.01)


def test_schedules() -> None:
    assert [CIFAR100.factor(epoch * 10, 10) for epoch in (0, 99, 100, 149, 150)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )
    factors = [DECODER.factor(step, 100) for step in range(400)]
    assert factors[0] == pytest.approx(1 / 50)
    assert max(factors) == factors[50] == 1
    assert factors[50:] == sorted(factors[50:], reverse=True)
    assert 0 < factors[-1] < 1e-4


def after_steps(method: str, steps: int = 9) -> tuple[Tensor, Tensor]:
    """x, the same for two workers on problems of their own, and the mean of what buffers hold."""

    def work(rank: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rank)
        inputs = torch.randn(5, 3, dtype=torch.float64, generator=generator)
        model = nn.Linear(3, 2, dtype=torch.float64)
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        wrapped = parse(method).wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
        for _ in range(steps):
            wrapped.zero_grad()
            model(inputs).square().mean().backward()
            wrapped.step()
        with wrapped.consensus():
            x = torch.cat([p.detach().flatten() for p in model.parameters()])
        return x, torch.cat([torch.zeros(0), *(b.flatten() for b in model.buffers())])

    (x, errors), (other, others) = together(2, work)
    assert torch.equal(x, other)
    return x, (errors + others) / 2


def test_feedback_on_gradients() -> None:
    """With plain SGD at a fixed rate it is error feedback on the updates; what was left out is kept."""
    x, errors = after_steps("GradientEF-SignSGD-SC")
    torch.testing.assert_close(x, after_steps("EF-SignSGD-SC")[0], atol=1e-12, rtol=0)
    assert (x - after_steps("SGD")[0]).abs().max() > 1e-3
    assert errors.abs().max() > 1e-3


# -- runs ------------------------------------------------------------------------------------------


def train(piece: Piece, path: Path, checkpoint: Path, epochs: int) -> list[Row]:
    """Rows after so many more epochs, on the piece's own workers, from the checkpoint if there is one."""

    def work(rank: int) -> list[Row]:
        run = Run(piece, load(piece.task.load, path))
        run.resume(checkpoint)
        coming = run.epochs(checkpoint, lambda: None)
        for _ in range(epochs):
            next(coming)
        return run.rows

    everyone = hvd_saef.run_workers(piece.task.workers, work)
    assert all(rows == everyone[0] for rows in everyone)
    return everyone[0]


def test_cifar100_preset(tmp_path: Path) -> None:
    """ResNet-56 on data in the original format: two steps an epoch, a checkpoint, and on."""
    write_cifar100(tmp_path)
    piece = Piece(CIFAR100, parse("SAEF-SignSGDM-DC p=16"), 0)
    assert piece in list(PRESETS["cifar100"].pieces())
    first = train(piece, tmp_path, tmp_path / "checkpoint", 1)
    rows = train(piece, tmp_path, tmp_path / "checkpoint", 1)
    assert [row.epoch for row in rows] == [1, 2]
    assert rows[0] == first[0]
    assert rows[1].bytes_sent == pytest.approx(2 * rows[0].bytes_sent)
    assert rows == train(piece, tmp_path, tmp_path / "uninterrupted", 2)


def test_imagenet_preset(tmp_path: Path) -> None:
    """ResNet-50 on a folder of images, with a small batch."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (60 + 7 * i, 80, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.jpg")
    task = next(PRESETS["imagenet"].pieces()).task
    piece = Piece(replace(task, batch=8), parse("SAEF-SignSGDM-DC"), 0)
    first = train(piece, tmp_path, tmp_path / "checkpoint", 1)
    rows = train(piece, tmp_path, tmp_path / "checkpoint", 1)
    assert rows[0] == first[0]
    assert [row.epoch for row in rows] == [1, 2]
    with pytest.raises(FileNotFoundError, match="is no folder"):
        data.image_folder(tmp_path / "train")


def test_feedback_on_gradients_goes_on(tmp_path: Path) -> None:
    """Each worker's errors are in its checkpoint."""
    digits = next(PRESETS["digits"].pieces()).task
    piece = Piece(replace(digits, epochs=2, evaluated=32), parse("GradientEF-SignSGDM-SC"), 0)
    train(piece, tmp_path, tmp_path / "checkpoint", 1)
    rows = train(piece, tmp_path, tmp_path / "checkpoint", 1)
    assert rows == train(piece, tmp_path, tmp_path / "uninterrupted", 2)


def test_wrong_number_of_workers() -> None:
    piece = next(PRESETS["digits"].pieces())
    with pytest.raises(ValueError, match="4 workers are wanted, 2 run"):
        together(2, lambda rank: Run(piece, data.mnist()))


def test_rows_are_read_as_written(tmp_path: Path) -> None:
    rows = [Row("t", "SGDM", 0, 1, 0.1, 0.2, 1 / 3, bytes_sent=1e9, float32_bytes=2.0), Row("t", "m", 1, 2)]
    write(tmp_path / "a.csv", rows)
    assert str(read(tmp_path / "a.csv")) == str(rows)
    assert read(tmp_path / "b.csv") == []


def test_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard gets each number of each row; all of them again from a run that goes on."""
    seen: list[tuple[str, float, int]] = []
    writer = SimpleNamespace(add_scalar=lambda *scalar: seen.append(scalar), close=lambda: None)
    monkeypatch.setattr(training, "_writer", lambda folder: writer)
    digits = next(PRESETS["digits"].pieces()).task
    piece = Piece(replace(digits, epochs=2, evaluated=32), parse("SAEF-SignSGDM-DC"), 0)
    train(piece, tmp_path, piece.file(tmp_path).with_suffix(".checkpoint"), 1)
    together(4, lambda rank: training.run(piece, tmp_path, None, lambda: None, tmp_path / "scalars"))
    numbers = [(asdict(row), row.epoch) for row in read(piece.file(tmp_path))]
    assert [epoch for _, epoch in numbers] == [1, 2]
    assert seen == [
        (name, value, epoch)
        for columns, epoch in numbers
        for name, value in columns.items()
        if isinstance(value, float)
    ]
    assert {"test_accuracy", "auxiliary_test_accuracy", "mismatch_exact"} <= {name for name, *_ in seen}


COMMAND = [sys.executable, "-W", "ignore", "-m", "benchmarks.paper", "run", "digits", "--seeds", "1"]
COMMAND += ["--methods", "SAEF-SignSGDM-DC", "--out"]
CSV = Path("digits", "SAEF-SignSGDM-DC-seed1.csv")


def test_killed_and_resumed(tmp_path: Path) -> None:
    """Killed at random moments, it ends with the same CSV, and nothing else, as undisturbed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*COMMAND, str(folder)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)

    undisturbed = start(tmp_path / "a")
    assert undisturbed.wait(LIMIT) == 0
    kills = 0
    for _ in range(20):
        process = start(tmp_path / "b")
        while not (tmp_path / "b" / CSV).exists() and process.poll() is None:
            time.sleep(0.01)
        try:
            code = process.wait(3 * random.random() if kills < 4 else LIMIT)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert code == 0
        break
    assert len(read(tmp_path / "a" / CSV)) == 3
    assert (tmp_path / "a" / CSV).read_bytes() == (tmp_path / "b" / CSV).read_bytes()
    assert [path.name for path in (tmp_path / "b" / "digits").iterdir()] == [CSV.name]


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C ends the runs side by side, and no others begin."""
    command = [*COMMAND[:-5], "--seeds", "0", "1", "--at-once", "2", "--out", str(tmp_path)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, before)
    while len(list(tmp_path.glob("digits/*.csv"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    begun = len(list(tmp_path.glob("digits/*.csv")))
    assert process.wait(LIMIT) == 130
    assert len(list(tmp_path.glob("digits/*.csv"))) <= begun + 2 < 8  # the two that ran just then


def test_finished_runs_are_skipped(tmp_path: Path) -> None:
    """A finished CSV is left alone; `--at-once` trains what is missing."""
    piece = Piece(next(PRESETS["digits"].pieces()).task, parse("SGDM"), 0)
    rows = [Row("digits", "SGDM", 0, epoch) for epoch in range(1, piece.task.epochs + 1)]
    write(piece.file(tmp_path), rows)
    before = piece.file(tmp_path).stat().st_mtime_ns
    command = [*COMMAND[:-5], "--methods", "SGDM", "EF-SignSGDM-DC", "--seeds", "0", "--at-once", "2"]
    subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, check=True, timeout=LIMIT)
    assert piece.file(tmp_path).stat().st_mtime_ns == before
    assert len(read(tmp_path / "digits" / "EF-SignSGDM-DC-seed0.csv")) == 3
    assert sorted(path.suffix for path in (tmp_path / "digits").iterdir()) == [".csv", ".csv"]
