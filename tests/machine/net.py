"""The little network that programs train, in torch and in numpy, and its data."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor, nn

from tests.oracle import Array

Vec = dict[str, Array]
"""Numbers by parameter name."""
SHAPES: dict[str, tuple[int, ...]] = {
    "first.weight": (3, 2),
    "first.bias": (3,),
    "second.weight": (2, 3),
    "second.bias": (2,),
    "extra.weight": (2, 2),
    "extra.bias": (2,),
}
LAYERS = ("first", "second", "extra")
NAMES = tuple(SHAPES)


def of_layers(layers: Collection[str]) -> tuple[str, ...]:
    """The names of some layers' parameters."""
    return tuple(name for name in NAMES if name.partition(".")[0] in layers)


def start_values(seed: int) -> Vec:
    """The same for all ranks."""
    generator = np.random.default_rng([5, seed])
    return {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}


def batch(rank: int, number: int) -> tuple[Array, Array]:
    """Inputs and targets of one rank."""
    generator = np.random.default_rng([11, rank, number])
    return generator.standard_normal((4, 2)), generator.standard_normal((4, 2))


class Net(nn.Module):
    """Two layers and one beside them. A batch goes through those of `used`; the others get no gradient."""

    def __init__(self, values: Vec) -> None:
        super().__init__()
        self.first = nn.Linear(2, 3)
        self.second = nn.Linear(3, 2)
        self.extra = nn.Linear(2, 2)
        self.double()
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(torch.from_numpy(values[name]))

    def forward(self, inputs: Tensor, used: Collection[str]) -> Tensor:
        """What comes out for inputs, [4, 2]."""
        hidden = self.first(inputs) if "first" in used else torch.cat([inputs, inputs[:, :1]], 1)
        hidden = torch.tanh(hidden)
        out: Tensor = self.second(hidden) if "second" in used else hidden[:, :2]
        return out + self.extra(inputs) if "extra" in used else out

    def loss(self, rank: int, number: int, used: Collection[str]) -> Tensor:
        """Of one batch."""
        inputs, targets = (torch.from_numpy(array) for array in batch(rank, number))
        out: Tensor = self(inputs, used)
        return (out - targets).square().mean()


def slopes(values: Vec, rank: int, number: int, used: Collection[str]) -> Vec:
    """The gradient of that loss, by hand, for the parameters of the layers used."""
    inputs, targets = batch(rank, number)
    if "first" in used:
        hidden = np.tanh(inputs @ values["first.weight"].T + values["first.bias"])
    else:
        hidden = np.tanh(np.concatenate([inputs, inputs[:, :1]], 1))
    out = hidden @ values["second.weight"].T + values["second.bias"] if "second" in used else hidden[:, :2]
    if "extra" in used:
        out = out + inputs @ values["extra.weight"].T + values["extra.bias"]
    error = 2 * (out - targets) / out.size
    gradient: Vec = {}
    back = np.concatenate([error, np.zeros((4, 1))], 1)
    if "second" in used:
        gradient |= {"second.weight": error.T @ hidden, "second.bias": error.sum(0)}
        back = error @ values["second.weight"]
    if "first" in used:
        back = back * (1 - hidden * hidden)
        gradient |= {"first.weight": back.T @ inputs, "first.bias": back.sum(0)}
    if "extra" in used:
        gradient |= {"extra.weight": error.T @ inputs, "extra.bias": error.sum(0)}
    return gradient
