"""Sparse gradients: refused by name on all workers, or made dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_saef import WorkerError
from tests.test_accumulation import SETTINGS, WORKERS, all_bits, wrapped
from tests.workers import NO_MODEL, network, together

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
]


class Words(nn.Module):
    """An embedding and a layer."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=sparse)
        self.head = network()
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(10, 4, generator=torch.Generator().manual_seed(3)))

    def forward(self, words: Tensor) -> Tensor:
        """A loss."""
        out: Tensor = (self.head(self.table(words)) ** 2).mean()
        return out


def words(rank: int, step: int) -> Tensor:
    """A few, with repetitions, not all."""
    return torch.randint(0, 8, (6,), generator=torch.Generator().manual_seed(100 * rank + step))


def take_step(optimizer: Any, synchronize: bool) -> None:
    """As it is, or by Horovod's recipe."""
    if synchronize:
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
    else:
        optimizer.step()


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("synchronize", [False, True], ids=["", "after synchronize()"])
def test_sparse_gradients_are_refused_by_name_on_all(
    options: dict[str, Any], workers: int, synchronize: bool
) -> None:
    """By the worker that has one with TypeError, by the others with WorkerError; nothing has changed."""

    def fn(rank: int) -> None:
        odd = workers - 1
        model = Words(sparse=False)
        optimizer = wrapped(model, **options)
        for step in range(2):
            optimizer.zero_grad()
            model(words(rank, step)).backward()
            optimizer.step()
        model.table.sparse = rank == odd
        optimizer.zero_grad()
        model(words(rank, 2)).backward()
        before = all_bits(model, optimizer)
        kind = TypeError if rank == odd else WorkerError
        with pytest.raises(kind, match=r"'table\.weight' is sparse.*sparse_as_dense=True") as caught:
            take_step(optimizer, synchronize)
        assert rank == odd or f"rank {odd}" in str(caught.value)
        assert all_bits(model, optimizer) == before

    together(workers, fn)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("how", ["step", "two backward passes", "synchronize and clip", "closure"])
def test_sparse_as_dense_is_dense(options: dict[str, Any], workers: int, how: str) -> None:
    def fn(rank: int, sparse: bool) -> dict[str, bytes]:
        model = Words(sparse)
        optimizer = wrapped(model, sparse_as_dense=True, **options)

        def closure(step: int) -> Tensor:
            optimizer.zero_grad()
            for i in range(2 if how == "two backward passes" else 1):
                loss: Tensor = model(words(rank, 10 * step + i))
                loss.backward()
            return loss

        for step in range(4):
            if how == "closure":
                optimizer.step(lambda step=step: closure(step))
                continue
            closure(step)
            if how == "synchronize and clip":
                optimizer.synchronize()
                for parameter in model.parameters():  # torch's clip_grad_norm_ takes no sparse gradients
                    if parameter.grad is not None:
                        parameter.grad = parameter.grad.to_dense() * 0.5
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                optimizer.step()
        return all_bits(model, optimizer)

    assert together(workers, lambda rank: fn(rank, True)) == together(workers, lambda rank: fn(rank, False))
