"""One run: a task by a method from a seed, an epoch a row; interrupted, it goes on where it was."""

from __future__ import annotations

import copy
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import hvd_saef
from benchmarks.paper.data import Batch, Data, Split
from benchmarks.paper.presets import Piece, Task
from benchmarks.paper.rows import Row, write
from hvd_saef.diagnostics import Monitor, auxiliary_point
from hvd_saef.transport.communicator import Communicator
from hvd_saef.transport.find import find_communicator

EVALUATED_AT_ONCE = 250
CALIBRATION_BATCHES = 8
BATCHES_AHEAD = 2
_building = threading.Lock()


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
        self.rows: list[Row] = []

    def resume(self, checkpoint: Path) -> None:
        """Load the last epoch's checkpoint, if there is one. Collective."""
        if any(self.workers.allgather_object((checkpoint / "manifest.json").exists())):
            saved = hvd_saef.load_checkpoint(checkpoint, self.model, self.optimizer)["rows"]
            self.rows = [Row(**row) for row in saved]

    def epochs(self, checkpoint: Path, after_step: Callable[[], None]) -> Iterator[Row]:
        """Train what is missing: a row for each epoch, saved before it is given. Collective."""
        for epoch in range(len(self.rows), self.task.epochs):
            before = self._bytes()
            self._train(epoch, after_step)
            self.optimizer.flush()
            self.rows.append(self._row(epoch + 1, before))
            rows = [asdict(row) for row in self.rows]
            hvd_saef.save_checkpoint(checkpoint, self.model, self.optimizer, rows=rows)
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

    def _batches(self, epoch: int) -> Iterator[Batch]:
        """This worker's share of each batch; the batches are the same for all methods.

        A thread prepares some ahead: decoding runs outside of Python's lock, and MPI does not like forks.
        """
        share, rank = self.task.batch // self.workers.size, self.workers.rank
        generator = torch.Generator().manual_seed(1_000_003 * self.piece.seed + epoch)
        order = torch.randperm(len(self.training), generator=generator).tolist()
        starts = range(rank * share, self.steps * self.task.batch, self.task.batch)
        lists = [order[start : start + share] for start in starts]
        with ThreadPoolExecutor(1) as ahead:
            coming: deque[Future[Batch]] = deque()
            for indices in lists:
                coming.append(ahead.submit(self.training.draw, indices))
                if len(coming) > BATCHES_AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def _row(self, epoch: int, before: dict[str, float]) -> Row:
        numbers: dict[str, Any] = self._evaluate()
        if self.monitor:
            with auxiliary_point(self.optimizer):
                numbers |= {f"auxiliary_{name}": value for name, value in self._evaluate().items()}
            numbers |= self.monitor.means()
            numbers.pop("round", None)
        for name, value in self._bytes().items():  # as counted since the optimizer was made
            numbers[name] = value - before[name] + (getattr(self.rows[-1], name) if self.rows else 0.0)
        return Row(self.task.name, self.piece.method.name, self.piece.seed, epoch, **numbers)

    def _bytes(self) -> dict[str, float]:
        stats = self.optimizer.stats()
        sent = stats["payload_bytes_sent"] + stats["dense_bytes_sent"] + stats["averaging_bytes_sent"]
        everyone = self.workers.allgather_object(sent)
        return {
            "bytes_sent": sum(everyone) / len(everyone),
            "float32_bytes": stats["ring_allreduce_bytes"] * self.piece.method.local_steps,
        }

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Training loss, test loss and test accuracy where the parameters are."""
        first = range(self.workers.rank, len(self.data.train), self.workers.size)
        calibration = [list(first[i : i + 32]) for i in range(0, 32 * CALIBRATION_BATCHES, 32)]
        hvd_saef.recalibrate_batchnorm(
            self.model, (self.data.train.batch(indices, None) for indices in calibration if indices)
        )
        self.model.eval()
        training_loss, _ = self._measure(self.data.train, self.task.evaluated)
        test_loss, accuracy = self._measure(self.data.test, None)
        return {"training_loss": training_loss, "test_loss": test_loss, "test_accuracy": accuracy}

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
    scalars: Any = _writer(tensorboard / piece.task.name / file.stem) if tensorboard and first else None

    def keep(new: list[Row]) -> None:
        if not first:
            return
        write(file, training.rows)
        for row in new if scalars else []:
            for name, value in asdict(row).items():
                if isinstance(value, float):
                    scalars.add_scalar(name, value, row.epoch)

    keep(training.rows)
    for row in training.epochs(checkpoint, after_step if first else _nothing):
        keep([row])
    if scalars:
        scalars.close()
    training.workers.allgather_object(None)  # everyone is done with the checkpoint
    if first:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=1)  # a run that goes on writes all its rows anew


def _nothing() -> None:
    pass
