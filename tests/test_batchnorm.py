"""BatchNorm's statistics at x over all workers, and workers with different numbers of batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from tests.workers import bits, together


def data(rank: int) -> list[tuple[Tensor, int]]:
    """A worker's batches, as a loader gives them; workers have different numbers."""
    generator = torch.Generator().manual_seed(rank)
    return [(torch.randn(16, 3, generator=generator) * (1 + rank) + rank, 0) for _ in range(3 + rank)]


def model_and_optimizer(rank: int) -> tuple[nn.Sequential, object]:
    """A model after some steps on the worker's own data."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4, momentum=0.2)
    )
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.copy_(torch.arange(float(parameter.numel())).view_as(parameter) / 10)
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = hvd_saef.DistributedOptimizer(inner, model.named_parameters(), model=model)
    for inputs, _ in data(rank)[: hvd_saef.common_steps(len(data(rank)))]:
        model.zero_grad()
        model[1](model[0](inputs)).pow(3).sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_statistics_are_those_of_x_over_all_workers(workers: int) -> None:
    def fn(rank: int) -> tuple[dict[str, bytes], Tensor, Tensor]:
        model, optimizer = model_and_optimizer(rank)
        model.train()
        model[3].eval()
        trained = bits(dict(model.named_parameters()))
        hvd_saef.recalibrate_batchnorm(model, data(rank))
        assert bits(dict(model.named_parameters())) == trained  # the training point is back
        assert [module.training for module in model] == [True, True, True, False]
        assert model[1].momentum == 0.1
        assert model[3].momentum == 0.2
        with optimizer.consensus():  # type: ignore[attr-defined]
            seen = [model[0](inputs).detach() for inputs, _ in data(rank)]
        means = torch.stack([batch.mean(0) for batch in seen]).mean(0)
        variances = torch.stack([batch.var(0) for batch in seen]).mean(0)
        running = {name: buffer for name, buffer in model.named_buffers() if "running" in name}
        return bits(running), torch.stack([means, variances]), running["1.running_var"]

    results = together(workers, fn)
    assert all(buffers == results[0][0] for buffers, _, _ in results)
    means = torch.stack([statistics[0] for _, statistics, _ in results])
    variances = torch.stack([statistics[1] for _, statistics, _ in results])
    expected = variances.mean(0) + means.var(0, correction=0)
    torch.testing.assert_close(results[0][2], expected)


def test_evaluation_stays_evaluation() -> None:
    def fn(rank: int) -> None:
        model, optimizer = model_and_optimizer(rank)
        optimizer.eval()  # type: ignore[attr-defined]
        x = bits(dict(model.named_parameters()))
        hvd_saef.recalibrate_batchnorm(model, data(rank))
        assert bits(dict(model.named_parameters())) == x

    together(2, fn)


def test_common_steps() -> None:
    assert together(3, lambda rank: hvd_saef.common_steps(5 + rank)) == [5, 5, 5]
    assert together(2, lambda rank: hvd_saef.common_steps(rank)) == [0, 0]

    def fn(rank: int) -> int:
        batches = data(rank)
        return sum(1 for _ in itertools.islice(batches, hvd_saef.common_steps(len(batches))))

    assert together(3, fn) == [3, 3, 3]
    with pytest.raises(ValueError, match=r"steps=-1: a whole number >= 0"):
        together(1, lambda rank: hvd_saef.common_steps(-1))
