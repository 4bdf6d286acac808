"""Means of gradients, of every form and dtype: over a worker's ranks, and over workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef import Compression
from tests.workers import NO_MODEL, together

pytestmark = pytest.mark.filterwarnings(NO_MODEL)

OPTIONS: dict[str, dict[str, Any]] = {
    "ranks": {"worker": "node"},
    "workers": {"feedback": "none", "compression": Compression.none},
}


def parameters() -> dict[str, nn.Parameter]:
    return {
        "matrix": nn.Parameter(torch.zeros(3, 4)),
        "number": nn.Parameter(torch.zeros(())),
        "empty": nn.Parameter(torch.zeros(0, 2)),
        "channels last": nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last)),
        "point": nn.Parameter(torch.zeros(4, 3, 1, 1)),
        "gaps": nn.Parameter(torch.zeros(6, 4)[:, ::2]),
        "half": nn.Parameter(torch.zeros(5, dtype=torch.float16)),
        "double": nn.Parameter(torch.zeros(5, dtype=torch.float64)),
        "other order": nn.Parameter(torch.zeros(3, 4)),
        "expanded": nn.Parameter(torch.zeros(3, 4)),
        "sparse": nn.Parameter(torch.zeros(4, 2)),
        "on one": nn.Parameter(torch.zeros(7)),
        "on none": nn.Parameter(torch.zeros(7)),
    }


def gradient_of(name: str, parameter: Tensor, rank: int) -> Tensor | None:
    if name == "on none" or (name == "on one" and rank == 0):
        return None
    numbers = torch.arange(parameter.numel(), dtype=parameter.dtype).view(parameter.shape) + 10 * rank
    if name == "channels last":
        return numbers.to(memory_format=torch.channels_last)
    if name == "point":  # one order of elements in memory, other strides
        return torch.empty_strided((4, 3, 1, 1), (3, 1, 3, 3)).copy_(numbers)
    if name == "other order":
        return numbers.T.contiguous().T
    if name == "expanded":
        return numbers[:1].expand(3, 4)
    return numbers.to_sparse(1) if name == "sparse" else numbers


def dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient.to_dense()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("over", ["ranks", "workers"])
def test_means_of_every_form(over: str, ranks: int) -> None:
    def fn(rank: int) -> dict[str, Tensor | None]:
        named = parameters()
        inner = torch.optim.SGD(named.values(), lr=0.1)
        options = OPTIONS[over] | {"sparse_as_dense": True}
        optimizer = hvd_saef.DistributedOptimizer(inner, named.items(), **options)
        for _ in range(2):  # the second time in memory that was used
            for name, parameter in named.items():
                parameter.grad = gradient_of(name, parameter, rank)
            optimizer.synchronize()
        for name, parameter in named.items():
            if name == "on none" and over == "ranks":
                assert parameter.grad is None
                continue
            assert parameter.grad is not None
            gradients = [dense(gradient_of(name, parameter, k), parameter) for k in range(ranks)]
            mean = torch.stack(gradients).double().mean(0).to(parameter.dtype)
            torch.testing.assert_close(parameter.grad, mean, atol=0, rtol=1e-6)
        return {name: p.grad for name, p in named.items()}

    first, *others = together(1, fn, ranks=ranks) if over == "ranks" else together(ranks, fn)
    for other in others:
        for name, gradient in other.items():
            mine = first[name]
            assert mine is gradient is None or (mine is not None and gradient is not None)
            assert mine is None or gradient is None or torch.equal(mine, gradient)
