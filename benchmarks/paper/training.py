"""One run: a task by a method from a seed, an epoch a row; interrupted, it goes on where it was."""

from __future__ import annotations

import copy
import csv
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import hvd_saef
from benchmarks.paper.data import Batch, Data, Split
from benchmarks.paper.presets import Piece, Task
from hvd_saef.communicator import Communicator, find_communicator
from hvd_saef.diagnostics import NUMBERS, Monitor, auxiliary_point

EVALUATED_AT_ONCE = 250
CALIBRATION_BATCHES = 8
_building = threading.Lock()


@dataclass
class Row:
    """A run after an epoch; None where a number does not exist. No times: a row is the same on any machine."""

    task: str
    method: str
    seed: int
    epoch: int
    training_loss: float
    """At x, as the two numbers below."""
    test_loss: float
    test_accuracy: float
    auxiliary_training_loss: float | None
    """At x̃, as the two numbers below."""
    auxiliary_test_loss: float | None
    auxiliary_test_accuracy: float | None
    bytes_sent: float
    """By a worker since the start, the mean over workers."""
    float32_bytes: float
    """What a float32 ring allreduce would have sent by now."""
    mismatch_exact: float | None = None
    """This and what follows: the means over the epoch of `hvd_saef.diagnostics.Measurement`."""
    mismatch_bound_ef: float | None = None
    mismatch_bound_saef: float | None = None
    server_error: float | None = None
    error: float | None = None
    mean_error: float | None = None
    error_variance: float | None = None
    update: float | None = None
    delta: float | None = None


MEASURED = [name for name in NUMBERS if name != "round"]


@lru_cache(maxsize=1)
def load(task_load: Callable[[Path | None], Data], path: Path | None) -> Data:
    """The task's data, read once a process."""
    return task_load(path)


class Run:
    """One worker's model, optimizer and data. Made, and used, by all workers together."""

    def __init__(self, piece: Piece, data: Data) -> None:
        self.piece, self.task, self.data = piece, piece.task, data
        self.workers: Communicator = find_communicator(None)[0]
        if self.workers.size != self.task.workers:
            raise ValueError(
                f"{piece.name}: {self.task.workers} workers are wanted, {self.workers.size} run."
            )
        with _building:  # threads share the random state
            torch.manual_seed(piece.seed)
            self.model = self.task.network(data.train.classes)
        inner = local_optimizer(self.task, piece.method.optimizer, self.model)
        self.optimizer: Any = piece.method.wrap(inner, self.model)
        self.monitor = Monitor(self.optimizer, self.task.diagnose_every) if piece.method.feeds_back else None
        self.training = copy.copy(data.train)  # augmented; evaluation's is not
        self.steps = len(data.train) // self.task.batch
        self.rows: list[dict[str, Any]] = []

    def resume(self, checkpoint: Path) -> None:
        """Load the last epoch's checkpoint, if there is one. Collective."""
        if any(self.workers.allgather_object((checkpoint / "manifest.json").exists())):
            self.rows = hvd_saef.load_checkpoint(checkpoint, self.model, self.optimizer)["rows"]

    def epochs(self, checkpoint: Path, after_step: Callable[[], None]) -> Iterator[dict[str, Any]]:
        """Train what is missing: a row for each epoch, saved before it is given. Collective."""
        for epoch in range(len(self.rows), self.task.epochs):
            before = self._bytes()
            self._train(epoch, after_step)
            self.optimizer.flush()
            self.rows.append(self._row(epoch + 1, before))
            hvd_saef.save_checkpoint(checkpoint, self.model, self.optimizer, rows=self.rows)
            yield self.rows[-1]

    def _train(self, epoch: int, after_step: Callable[[], None]) -> None:
        self.training.augment(self.piece.seed, epoch)
        self.model.train()
        base = self.task.rate * self.piece.method.rate
        for number, (inputs, targets) in enumerate(self._batches(epoch)):
            for group in self.optimizer.param_groups:
                group["lr"] = base * self.task.factor(epoch * self.steps + number, self.steps)
            self.optimizer.zero_grad()
            loss(self.model(inputs), targets).backward()
            self.optimizer.step()
            after_step()

    def _batches(self, epoch: int) -> DataLoader[Batch]:
        """This worker's share of each batch; the batches are the same for all methods."""
        share, rank = self.task.batch // self.workers.size, self.workers.rank
        generator = torch.Generator().manual_seed(1_000_003 * self.piece.seed + epoch)
        order = torch.randperm(len(self.training), generator=generator).tolist()
        starts = range(rank * share, self.steps * self.task.batch, self.task.batch)
        lists = [order[start : start + share] for start in starts]
        return DataLoader(
            self.training, batch_sampler=lists, collate_fn=_as_it_is, num_workers=self.task.loaders
        )

    def _row(self, epoch: int, before: dict[str, float]) -> dict[str, Any]:
        at_x = self._evaluate(epoch)
        auxiliary: tuple[float | None, ...] = (None, None, None)
        if self.piece.method.feeds_back:
            with auxiliary_point(self.optimizer):
                auxiliary = self._evaluate(epoch)
        counted = {
            name: value - before[name] + (self.rows[-1][name] if self.rows else 0.0)
            for name, value in self._bytes().items()
        }
        measured = self.monitor.means() if self.monitor else {}
        row = Row(
            self.task.name,
            self.piece.method.name,
            self.piece.seed,
            epoch,
            *at_x,
            *auxiliary,
            **counted,
            **{name: measured[name] for name in MEASURED if measured},
        )
        return asdict(row)

    def _bytes(self) -> dict[str, float]:
        stats = self.optimizer.stats()
        sent = stats["payload_bytes_sent"] + stats["dense_bytes_sent"] + stats["averaging_bytes_sent"]
        everyone = self.workers.allgather_object(sent)
        return {
            "bytes_sent": sum(everyone) / len(everyone),
            "float32_bytes": stats["ring_allreduce_bytes"] * self.piece.method.local_steps,
        }

    @torch.no_grad()
    def _evaluate(self, epoch: int) -> tuple[float, float, float]:
        """Training loss, test loss and test accuracy where the parameters are."""
        first = range(self.workers.rank, len(self.data.train), self.workers.size)
        calibration = [list(first[i : i + 32]) for i in range(0, 32 * CALIBRATION_BATCHES, 32)]
        hvd_saef.recalibrate_batchnorm(
            self.model, (self.data.train.batch(indices, None) for indices in calibration if indices)
        )
        self.model.eval()
        training_loss, _ = self._measure(self.data.train, self.task.evaluated)
        test_loss, accuracy = self._measure(self.data.test, None)
        return training_loss, test_loss, accuracy

    def _measure(self, split: Split, most: int | None) -> tuple[float, float]:
        """Mean loss and accuracy over the first `most` examples, each worker taking its share."""
        mine = list(range(min(len(split), most or len(split))))[self.workers.rank :: self.workers.size]
        sums, count = torch.zeros(2, dtype=torch.float64), 0
        for start in range(0, len(mine), EVALUATED_AT_ONCE):
            inputs, targets = split.batch(mine[start : start + EVALUATED_AT_ONCE], None)
            scores = self.model(inputs)
            sums[0] += loss(scores, targets).item() * targets.numel()
            sums[1] += (scores.argmax(-1) == targets).sum().item()
            count += targets.numel()
        everyone = self.workers.allgather_object((*sums.tolist(), count))
        losses, correct, counts = (sum(column) for column in zip(*everyone, strict=True))
        return losses / counts, correct / counts


def loss(scores: Tensor, targets: Tensor) -> Tensor:
    """The mean cross entropy, over all places of all examples."""
    return functional.cross_entropy(scores.flatten(0, -2), targets.flatten())


def local_optimizer(task: Task, kind: str, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that takes the local steps."""
    if kind == "AdamW":
        return torch.optim.AdamW(
            model.parameters(), lr=task.rate, betas=(0.9, 0.95), weight_decay=task.weight_decay
        )
    momentum = 0.9 if kind == "SGDM" else 0.0
    return torch.optim.SGD(
        model.parameters(), lr=task.rate, momentum=momentum, weight_decay=task.weight_decay
    )


def run(
    piece: Piece, folder: Path, path: Path | None, after_step: Callable[[], None], tensorboard: Path | None
) -> None:
    """Train `piece`, or go on with it, until its CSV in `folder` is finished. Collective."""
    file = piece.file(folder)
    checkpoint = file.with_suffix(".checkpoint")
    training = Run(piece, load(piece.task.load, path))
    training.resume(checkpoint)
    first = training.workers.rank == 0
    scalars = _writer(tensorboard / piece.task.name / file.stem) if tensorboard and first else None
    if first:
        write(file, training.rows)
    for row in training.epochs(checkpoint, after_step if first else _nothing):
        if first:
            write(file, training.rows)
            for name, value in row.items():
                if scalars and isinstance(value, float):
                    scalars.add_scalar(name, value, row["epoch"])
    if scalars:
        scalars.close()
    training.workers.allgather_object(None)  # everyone is done with the checkpoint
    if first:
        shutil.rmtree(checkpoint, ignore_errors=True)


def finished(piece: Piece, folder: Path) -> bool:
    """Whether its CSV has all epochs."""
    file = piece.file(folder)
    return file.exists() and len(file.read_text().splitlines()) == 1 + piece.task.epochs


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """The CSV of `rows`, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    with open(temporary, "w", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, file)


def _writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)  # type: ignore[no-untyped-call]


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _nothing() -> None:
    pass
