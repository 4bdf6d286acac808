"""The whole step of real models: without an exchange, with ours, with DistributedDataParallel.

One worker has no wire, so what ours adds to the step is all that it costs beside the wire. Processes that
share a GPU over gloo have one, through host memory; there the device is shared as well.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.gpu.steps ROWS DEVICE
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import hvd_saef
from benchmarks.gpu.clock import seconds
from benchmarks.gpu.models import Task, tasks
from benchmarks.gpu.pieces import ROOT, Place, Row, arrived
from hvd_saef import Compression, run_workers
from hvd_saef.compression import Blocks

NO_EXCHANGE, DDP = "no exchange", "DDP"
ROUNDS, WARM = 5, 3
Wrap = Callable[[nn.Module, torch.optim.Optimizer], tuple[nn.Module, Any]]
OURS: dict[str, dict[str, Any]] = {
    "sign DC": {},
    "sign DC, overlap": {"overlap": True},
    "Top-K 1 %": {"compression": Compression.topk(0.01)},
}


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    return model, optimizer


def _ddp(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True), optimizer


def _ours(options: dict[str, Any]) -> Wrap:
    def wrap(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        named = model.named_parameters()
        return model, hvd_saef.DistributedOptimizer(optimizer, named, model=model, **options)

    return wrap


def methods() -> dict[str, Wrap]:
    """By their names."""
    return {NO_EXCHANGE: _plain, **{name: _ours(options) for name, options in OURS.items()}, DDP: _ddp}


class Training:
    """One method's model, optimizer and batch."""

    def __init__(self, task: Task, wrap: Wrap, place: Place) -> None:
        torch.manual_seed(0)
        model = task.model().to(place.device)
        self.task, self.place = task, place
        self.model, self.optimizer = wrap(model, task.optimizer(model.parameters()))
        self.batch = task.batch(place, torch.Generator().manual_seed(1))

    def steps(self, number: int) -> float:
        """The seconds of a step."""
        self.place.wait()
        start = time.perf_counter()
        for _ in range(number):
            self.optimizer.zero_grad()
            torch.autograd.backward(self.task.loss(self.model, *self.batch))
            self.optimizer.step()
        self.place.wait()
        return (time.perf_counter() - start) / number

    def backward(self) -> float:
        """The seconds of a backward pass alone."""
        loss = self.task.loss(self.model, *self.batch)
        self.place.wait()
        start = time.perf_counter()
        torch.autograd.backward(loss)
        self.place.wait()
        return time.perf_counter() - start


def rows_of(task: Task, place: Place, workers: int, budget: float) -> Iterator[Row]:
    """All methods for one model, in turns, so that what disturbs the machine meets all alike. Collective."""
    trainings = {name: Training(task, wrap, place) for name, wrap in methods().items()}
    for training in trainings.values():
        training.steps(WARM)
    once = max(agreed(training.steps(1)) for training in trainings.values())
    number = 1 if place.tiny else max(1, min(20, int(budget / (ROUNDS * len(trainings) * once))))
    taken: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(1 if place.tiny else ROUNDS):
        for name, training in trainings.items():
            if dist.get_world_size() > 1:
                dist.barrier()
            taken[name].append(training.steps(number))
    backward = statistics.median(trainings[NO_EXCHANGE].backward() for _ in range(3))
    sizes = [p.numel() for p in trainings[NO_EXCHANGE].model.parameters()]
    for name, times in taken.items():
        row: Row = {"model": task.name, "workers": workers, "method": name, "elements": sum(sizes)}
        row |= {"ms": 1e3 * statistics.median(times), "steps": number, "backward ms": 1e3 * backward}
        beside = zip(times, taken[NO_EXCHANGE], strict=True)
        row["added ms"] = 1e3 * statistics.median(one - other for one, other in beside)
        if name in OURS:
            compressor = OURS[name].get("compression", Compression.sign)
            row["payload"] = compressor.payload_bytes(Blocks.cut(sizes, None, torch.float32))
        yield row


def agreed(number: float) -> float:
    """Rank 0's number, on all ranks."""
    numbers = [number]
    dist.broadcast_object_list(numbers)
    return numbers[0]


def alone(place: Place) -> Iterator[Row]:
    """One worker, whose exchange has no wire."""
    backend = "nccl" if place.on_gpu and dist.is_nccl_available() else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    if place.on_gpu:
        torch.cuda.set_device(place.device)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    warnings.simplefilter("ignore")
    for task in tasks(place):

        def train(rank: int, task: Task = task) -> list[Row]:
            return list(rows_of(task, place, 1, budget=15.0))

        (found,) = run_workers(1, train)
        yield from found
        _forget(place)
    dist.destroy_process_group()


def together(place: Place, processes: int = 2) -> Iterator[Row]:
    """Processes that share the device, over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows")
        rows.touch()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            f"--nproc-per-node={processes}",
            "-m",
            "benchmarks.gpu.steps",
            str(rows),
            str(place.device),
        ]
        job = subprocess.Popen([*command, "tiny" if place.tiny else "whole"], cwd=ROOT)
        with open(rows) as lines:
            while True:
                ended = job.poll() is not None
                yield from arrived(lines)
                if ended:
                    break
                time.sleep(0.1)
        if job.returncode:
            raise RuntimeError(f"the ranks ended with exit code {job.returncode}")


def _forget(place: Place) -> None:
    if place.on_gpu:
        torch.cuda.empty_cache()


def copies(place: Place) -> Iterator[Row]:
    """Payloads to page-locked host memory and back, as they travel where MPI does not reach the device."""
    for megabytes in (1, 4) if place.tiny else (1, 4, 16, 64):
        device = torch.ones(megabytes << 20, dtype=torch.uint8, device=place.device)
        host = torch.empty(device.shape, dtype=torch.uint8, pin_memory=place.on_gpu)
        there = seconds(place, lambda: host.copy_(device, non_blocking=True), 10)  # noqa: B023
        back = seconds(place, lambda: device.copy_(host, non_blocking=True), 10)  # noqa: B023
        yield {
            "name": f"{megabytes} MiB to the host and back",
            "bytes": device.numel(),
            "seconds": there + back,
        }


def main(output: str, device: str, size: str) -> None:
    """One rank of several."""
    place = Place(torch.device(device), tiny=size == "tiny")
    dist.init_process_group("gloo")
    warnings.simplefilter("ignore")
    for task in tasks(place):
        rows = list(rows_of(task, place, dist.get_world_size(), budget=25.0))
        if dist.get_rank() == 0:
            with open(output, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        _forget(place)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*itertools.islice(sys.argv, 1, 4))
