"""Sparse gradients: taken as they are where gradients are local; made dense; else refused by name on all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef import Compression, NonFiniteUpdateError, WorkerError
from tests.round.test_accumulation import SETTINGS, WORKERS, all_bits, wrapped
from tests.workers import NO_MODEL, bits, caught, network, together

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


# -- as they are, where gradients are local -----------------------------------------------------------------

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
LOCAL = {name: options for name, options in SETTINGS.items() if name != "dense"}
MAKES: dict[str, Make] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "SparseAdam": lambda parameters: torch.optim.SparseAdam(parameters, lr=0.1),
}


class Table:
    """A sparse table and its optimizer, on one worker."""

    def __init__(self, rank: int, make: Make, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.rank = rank
        self.model = Words(sparse=True).table.to(dtype)
        self.optimizer: Any = make(list(self.model.parameters()))
        if options:
            self.optimizer = hvd_saef.DistributedOptimizer(self.optimizer, model=self.model, **options)

    def backward(self, step: int) -> Tensor:
        """A gradient in which some rows come twice."""
        self.optimizer.zero_grad()
        loss: Tensor = (self.model(words(self.rank, step)) - 0.3).square().sum()
        return loss

    def step(self, times: int) -> Table:
        """Some steps."""
        for step in range(times):
            self.backward(step).backward()
            self.optimizer.step()
        return self


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_one_worker_without_compression_is_torch(make: Make) -> None:
    def fn(rank: int) -> Tensor:
        table = Table(rank, make, compression=Compression.none).step(6)
        table.optimizer.eval()
        return table.model.weight.detach()

    torch.testing.assert_close(together(1, fn)[0], Table(0, make).step(6).model.weight.detach())


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("options", LOCAL.values(), ids=LOCAL)
def test_sparse_gradients_train(options: dict[str, Any], make: Make, workers: int) -> None:
    """All have the same x; rows that no worker saw stay; the optimizer got the gradient sparse."""

    def fn(rank: int) -> dict[str, bytes]:
        table = Table(rank, make, **{"compression": Compression.sign} | options).step(6)
        assert table.model.weight.grad is not None
        assert table.model.weight.grad.is_sparse
        x = table.optimizer.state_dict()["hvd_saef"]["x"]["noname.0.0"]
        assert (x - Words(sparse=True).table.weight)[:8].any()
        if options.get("compression") is Compression.none:
            torch.testing.assert_close(x[8:], Words(sparse=True).table.weight.detach()[8:])
        return bits(x)

    first, *others = together(workers, fn)
    assert all(other == first for other in others)


@pytest.mark.parametrize("as_dense", [False, True])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_overlap(make: Make, as_dense: bool) -> None:
    """As without; and a sum of rows that overflows is found where it leaves early, too."""

    def fn(rank: int, overlap: bool, bad: bool) -> dict[str, bytes]:
        table = Table(rank, make, overlap=overlap, sparse_as_dense=as_dense).step(4)
        if bad:
            table.optimizer.zero_grad()
            (table.model(torch.zeros(2, dtype=torch.int64)) * 3e38).sum().backward()
            table.optimizer.step()
        return all_bits(table.model, table.optimizer)

    ours, plain = (together(3, lambda rank, on=on: fn(rank, on, False)) for on in (True, False))  # type: ignore[misc]
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine == theirs
    for failure in caught(3, lambda rank: fn(rank, True, True)):
        assert isinstance(failure, NonFiniteUpdateError), repr(failure)


def test_workers_may_differ_in_what_is_sparse() -> None:
    def fn(rank: int, odd: int) -> dict[str, bytes]:
        table = Table(rank, MAKES["SGD"], block_size=4)
        table.model.sparse = rank != odd
        return all_bits(table.model, table.step(5).optimizer)

    assert together(2, lambda rank: fn(rank, 1)) == together(2, lambda rank: fn(rank, -1))


@pytest.mark.parametrize(
    ("dtype", "unscale"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, False)],
    ids=["float32", "unscaled by the user", "float16"],
)
def test_grad_scaler(dtype: torch.dtype, unscale: bool) -> None:
    """Scaled by a power of two: the same bits as unscaled; rank 1 overflows once."""

    def fn(rank: int, scaling: bool) -> dict[str, bytes]:
        table = Table(rank, MAKES["SGD"], dtype, block_size=4)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaling)
        for step in range(4):
            loss = table.backward(step)
            if scaling and (step, rank) == (2, 1):
                loss = loss * math.inf
            scaler.scale(loss).backward()
            if not scaling and step == 2:
                continue
            if unscale:
                scaler.unscale_(table.optimizer)
            scaler.step(table.optimizer)
            scaler.update()
        assert table.optimizer.stats()["skipped"] == (1 if scaling else 0)
        return all_bits(table.model, table.optimizer)

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


@pytest.mark.parametrize("bad", [[math.nan], [3e38, 3e38]], ids=["nan", "rows whose sum overflows"])
def test_nonfinite_values_are_named(bad: list[float]) -> None:
    def fn(rank: int) -> None:
        table = Table(rank, MAKES["SGD"], block_size=4).step(2)
        table.backward(2).backward()
        if rank == 1:
            values = torch.tensor(bad).unsqueeze(1).expand(-1, 4)
            places = torch.zeros(1, len(bad), dtype=torch.int64)
            table.model.weight.grad = torch.sparse_coo_tensor(places, values, (10, 4))
        before = all_bits(table.model, table.optimizer)
        try:
            table.optimizer.step()
        finally:
            assert all_bits(table.model, table.optimizer) == before

    for failure in caught(3, fn):
        assert isinstance(failure, NonFiniteUpdateError), repr(failure)
        assert "'noname.0.0' on rank 1" in str(failure)


# -- where gradients are averaged ---------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("synchronize", [False, True], ids=["", "after synchronize()"])
def test_sparse_gradients_are_not_averaged(workers: int, synchronize: bool) -> None:
    """TypeError by the worker that has one, WorkerError by the others; nothing has changed."""

    def fn(rank: int) -> None:
        odd = workers - 1
        model = Words(sparse=False)
        optimizer = wrapped(model, **SETTINGS["dense"])
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


def test_one_worker_has_nothing_to_average() -> None:
    ours = together(1, lambda rank: Table(rank, MAKES["SparseAdam"], **SETTINGS["dense"]).step(5).model)[0]
    assert torch.equal(ours.weight, Table(0, MAKES["SparseAdam"]).step(5).model.weight)


@pytest.mark.parametrize("feedback", ["none", "saef"])
def test_sparse_adam_gets_sparse_gradients_back(feedback: Any) -> None:
    """With sparse_as_dense, as from Horovod; a worker without gradient counts as zero."""
    options: dict[str, Any] = {"compression": Compression.none, "feedback": feedback, "sparse_as_dense": True}
    gradients = [[words(rank, step) for rank in range(2)] for step in range(4)]

    def slope(table: nn.Embedding, chosen: Tensor) -> Tensor:
        return torch.autograd.grad((table(chosen) - 0.3).square().sum(), table.weight)[0]

    def fn(rank: int) -> Tensor:
        table = Table(rank, MAKES["SparseAdam"], **options)
        for step in range(4):
            table.model.weight.grad = slope(table.model, gradients[step][rank])
            if feedback == "none" and rank == 1 and step == 2:
                table.model.weight.grad = None
            table.optimizer.step()
        return table.model.weight.detach()

    first, second = together(2, fn)
    assert torch.equal(first, second)
    if feedback == "none":
        alone = Table(0, MAKES["SparseAdam"])
        for step in range(4):
            both = [slope(alone.model, gradients[step][rank]) for rank in ([0] if step == 2 else [0, 1])]
            alone.model.weight.grad = (torch.stack([g.to_dense() for g in both]).sum(0) / 2).to_sparse(1)
            alone.optimizer.step()
        torch.testing.assert_close(first, alone.model.weight.detach())


# -- made dense ---------------------------------------------------------------------------------------------


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
