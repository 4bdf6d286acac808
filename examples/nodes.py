"""Trains with full precision inside a node and compressed updates between nodes.

    mpirun -np 8 -H node1:4,node2:4 python examples/nodes.py
    mpirun -np 4 python examples/nodes.py --groups 2        # two pretended nodes of two ranks on one machine

The ranks of a node average their gradients before each local step, so that K is the number of nodes and not
of ranks: fewer errors, and between nodes the bytes of one rank a node (docs/nodes.md).
"""

from __future__ import annotations

import argparse
from typing import Any

import horovod.torch as hvd
import torch
from mpi4py import MPI
from torch import nn

import hvd_saef


def main() -> None:
    """Train on a made-up regression problem, and print the loss on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, help="so many groups of ranks are the workers, not the nodes")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    args = parser.parse_args()

    worker: Any = "node"
    if args.groups:
        each = MPI.COMM_WORLD.Get_size() // args.groups
        worker = [list(range(first * each, (first + 1) * each)) for first in range(args.groups)]
    hvd.init(process_sets=hvd_saef.process_sets(worker))  # Horovod averages within these sets
    torch.manual_seed(0)
    torch.set_num_threads(1)
    truth = nn.Linear(20, 5)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = hvd_saef.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), model=model, worker=worker
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    own = torch.Generator().manual_seed(1 + hvd.rank())  # each rank has its own data
    for step in range(1, args.steps + 1):
        model.train()
        inputs = torch.randn(32, 20, generator=own)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), truth(inputs).detach()).backward()
        optimizer.step()
        if step % max(1, args.steps // 4) == 0:
            model.eval()
            with torch.no_grad():
                inputs = torch.randn(256, 20, generator=torch.Generator().manual_seed(0))
                loss = nn.functional.mse_loss(model(inputs), truth(inputs)).item()
            stats = optimizer.stats()
            if hvd.rank() == 0:
                print(
                    f"step {step}: loss {loss:.4f}, {stats['payload_bytes_sent']:.0f} bytes sent between "
                    f"workers, {stats['node_bytes_sent']:.0f} inside this one",
                    flush=True,
                )


if __name__ == "__main__":
    main()
