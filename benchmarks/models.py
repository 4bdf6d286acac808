"""Models in the shapes of real ones whose backward costs one pass: what is left of a step is the exchange.

With `rows`, backward costs what a real one costs as well: a product of matrices for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """ResNet-50's 161 parameters, 25.6 M elements, in its order."""

    def convolution(out: int, inputs: int, kernel: int) -> list[Shape]:
        return [(out, inputs, kernel, kernel), (out,), (out,)]  # and its norm's weight and bias

    shapes = convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, inputs, 1) + convolution(width, width, 3)
            shapes += convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def transformer(width: int = 768, layers: int = 12, words: int = 18432, context: int = 1024) -> list[Shape]:
    """A decoder's parameters, 100.0 M elements: embeddings, then attention, norms and MLP by layer."""
    layer: list[Shape] = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(words, width), (context, width), *(layers * layer), (width,), (width,)]


def tiny() -> list[Shape]:
    """A hundred thousand elements, to see whether everything runs."""
    return [(300, 300), (300,), (50, 200), (50,)]


SHAPES: dict[str, Callable[[], list[Shape]]] = {
    "resnet50": resnet50,
    "transformer": transformer,
    "tiny": tiny,
}
"""By their names on the command line."""


class Inner(torch.autograd.Function):
    """<parameter, constant>, of which only the backward is computed."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, constant: Tensor, batch: Tensor) -> Tensor:
        """A zero: the forward costs nothing."""
        ctx.save_for_backward(constant, batch)
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The constant, times what comes from above; and the work of a weight gradient, for the batch."""
        constant, batch = ctx.saved_tensors
        matrix = constant.flatten(1) if constant.dim() > 1 else constant[None]
        if len(batch):  # outputs' gradients, transposed, times inputs: what the product holds does not matter
            torch.mm(batch[:, : matrix.shape[0]].T, batch[:, : matrix.shape[1]])
        return constant * gradients[0], None, None


class StandIn(nn.Module):
    """Parameters over given memory; calling it gives the loss, the sum of <parameter, constant>.

    Gradients become complete one parameter after the other, the last first, as a real model's do.
    """

    def __init__(self, memory: list[Tensor], constants: list[Tensor], rows: int = 0) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(tensor.detach()) for tensor in memory)
        self.constants = constants
        widest = max(max(len(tensor), tensor[0].numel()) for tensor in memory)
        self.batch = torch.ones(rows, widest)

    def forward(self) -> Tensor:
        """The loss."""
        parts = [
            Inner.apply(parameter, constant, self.batch)
            for parameter, constant in zip(self.parts, self.constants, strict=True)
        ]
        return torch.stack(parts).sum()
