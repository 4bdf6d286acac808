"""Training with a DataLoader whose workers are processes: a script as users write it.

mpirun -np 2 python -m tests.mpi.loaders METHOD, one of fork, spawn and forkserver
"""

import sys

import horovod.torch as hvd
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import hvd_saef
from tests.workers import network


class Rows(Dataset[torch.Tensor]):
    """As many as there are; defined here, so that a worker that was not forked must import this file."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), index / 48)


def train(method: str, persistent: bool) -> None:
    """Two epochs, and one that is left in the middle."""
    model = network()
    optimizer = hvd_saef.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        model=model,
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    sampler: DistributedSampler[torch.Tensor] = DistributedSampler(Rows(), hvd.size(), hvd.rank())
    loader = DataLoader(
        Rows(),
        batch_size=4,
        sampler=sampler,
        num_workers=2,
        multiprocessing_context=method,
        persistent_workers=persistent,
    )
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for number, rows in enumerate(loader):
            optimizer.zero_grad()
            model(rows).square().sum().backward()
            optimizer.step()
            if epoch == 2 and number == 1:
                break
    assert optimizer.stats()["rounds"] == 14
    print(f"rank {hvd.rank()}: {method}, {persistent=}", flush=True)


if __name__ == "__main__":
    hvd.init()
    for persistent in (False, True):
        train(sys.argv[1], persistent)
