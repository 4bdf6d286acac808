"""Trains a small network over torch.distributed, with torch alone: no Horovod, no MPI, no data to fetch.

    torchrun --nproc-per-node 4 examples/torchrun.py

The script is the usual one for DistributedDataParallel, with two changes. The model is not wrapped, since
DistributedDataParallel would send all gradients in full precision; and the optimizer is. The network learns
which byte comes next in the source code of Python's standard library.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hvd_saef

CONTEXT = 8
"""The bytes that the model sees."""


def text() -> Tensor:
    """Some of the standard library's files, as bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def network(width: int = 64) -> nn.Module:
    """Bytes to the scores of the next byte: an embedding and two linear layers."""
    return nn.Sequential(
        *(nn.Embedding(256, width), nn.Flatten()),
        *(nn.Linear(CONTEXT * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 256)),
    )


def loss_on(model: nn.Module, data: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """The mean cross entropy of the next byte, at `number` places of the data."""
    starts = torch.randint(len(data) - CONTEXT - 1, (number, 1), generator=generator)
    lines = data[starts + torch.arange(CONTEXT + 1)].long()
    return nn.functional.cross_entropy(model(lines[:, :-1]), lines[:, -1])


def main() -> None:
    """Train, and print on rank 0 how well the model does at x, on bytes that it has not seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--lr", type=float, default=0.05, help="learning rate")
    args = parser.parse_args()

    dist.init_process_group("gloo")  # "nccl" for models on GPUs (untried)
    torch.manual_seed(0)  # the same start on every rank: nothing is broadcast here
    torch.set_num_threads(1)
    everything = text()
    data, tested = everything[:-100_000], everything[-100_000:]
    model = network()  # was: DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    optimizer = hvd_saef.DistributedOptimizer(  # this line is new
        optimizer,
        named_parameters=model.named_parameters(),
        model=model,
        block_size=4096,  # each so many parameters have a scale of their own
    )
    own = torch.Generator().manual_seed(1 + dist.get_rank())  # each rank has its own data
    for step in range(1, args.steps + 1):
        model.train()
        optimizer.zero_grad()
        loss_on(model, data, 32, own).backward()
        optimizer.step()
        if step % (args.steps // 4) == 0 and dist.get_rank() == 0:
            model.eval()  # the model was given as model=: in eval mode it computes at x
            with torch.no_grad():
                loss = loss_on(model, tested, 2000, torch.Generator().manual_seed(0)).item()
            ratio = optimizer.stats()["compression_ratio"]
            print(f"step {step}: loss {loss:.3f}, sent 1/{ratio:.1f} of float32", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
