"""Parameters of every kind: dtypes, strides, frozen ones, tied ones, several groups, empty ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef import Compression, Compressor, run_workers
from hvd_saef.compression import state_dtype
from tests.problems import outcome, same_bits, worst

pytestmark = [
    pytest.mark.filterwarnings("ignore:parameters are stepped ahead"),
    pytest.mark.filterwarnings("ignore:the largest block"),
]

Make = Callable[[], list[nn.Parameter]]
FLOATING = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same numbers on every worker."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def slope(at: Tensor, rank: int, step: int) -> Tensor:
    """A gradient that tells workers, steps and values apart, but not elements."""
    return torch.sin(5 * at + rank) + 0.5 * at + 0.1 * ((step * 7 + rank * 3) % 5 - 2)


def train(make: Make, workers: int = 3, steps: int = 8, **options: Any) -> list[Any]:
    """Of each worker, the wrapped optimizer after training what `make` gives, by SGD with momentum."""

    def work(rank: int) -> Any:
        parameters = make()
        optimizer = hvd_saef.DistributedOptimizer(
            torch.optim.SGD(parameters, lr=0.1, momentum=0.5), **options
        )
        for step in range(steps):
            for parameter in parameters:
                parameter.grad = slope(parameter.detach(), rank, step)
            optimizer.step()
        return optimizer

    return run_workers(workers, work)


def ours(optimizer: Any, key: str) -> list[Tensor]:
    """What the state dict holds under `key`, in the order of the parameters."""
    return list(optimizer.state_dict()["hvd_saef"][key].values())


def agree(optimizers: list[Any]) -> bool:
    """Whether x has the same bits on all workers."""
    bits = [[x.contiguous().view(-1).view(torch.uint8).tolist() for x in ours(o, "x")] for o in optimizers]
    return all(b == bits[0] for b in bits)


# -- dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("compression", [Compression.sign, Compression.topk(0.2), Compression.none])
@pytest.mark.parametrize("dtypes", [*[[d] for d in FLOATING], FLOATING], ids=str)
def test_dtypes(dtypes: list[torch.dtype], compression: Compressor, double: bool) -> None:
    """The state is float32 or wider, and the model holds b = x - e rounded to its dtype.

    It is by the mean of that b - y that x~ moves: nothing is lost to the narrow dtype.
    """

    def work(rank: int) -> list[Any]:
        parameters = [nn.Parameter(normal(5, 3, dtype=d, seed=i)) for i, d in enumerate(dtypes)]
        base = torch.optim.SGD(parameters, lr=0.1)
        optimizer = hvd_saef.DistributedOptimizer(base, compression=compression, double_compression=double)
        seen: list[Any] = []
        for step in range(8):
            b = [p.detach().clone() for p in parameters]
            for p in parameters:
                p.grad = slope(p.detach(), rank, step)
            copies = [nn.Parameter(p.detach().clone()) for p in parameters]
            for copy, p in zip(copies, parameters, strict=True):
                copy.grad = p.grad
            torch.optim.SGD(copies, lr=0.1).step()
            optimizer.step()
            x, e = ours(optimizer, "x"), ours(optimizer, "errors")
            assert [t.dtype for t in (*x, *e)] == 2 * [state_dtype(d) for d in dtypes]
            for p, xi, ei in zip(parameters, x, e, strict=True):
                assert torch.equal(p, (xi - ei).to(p.dtype))
                assert torch.equal(p.double(), (xi - ei).double()) == (p.dtype == xi.dtype)
            update = [(bi.double() - y.detach().double()).numpy() for bi, y in zip(b, copies, strict=True)]
            seen.append((update, outcome(optimizer, parameters)))
        return seen

    workers = run_workers(3, work)
    before = [normal(5, 3, dtype=d, seed=i).double().numpy() for i, d in enumerate(dtypes)]
    for of_round in zip(*workers, strict=True):
        assert all(same_bits(held.x, of_round[0][1].x) for _, held in of_round)
        for i, dtype in enumerate(dtypes):
            server_error = np.zeros(15)
            for _, held in of_round:
                start, values = held.server_error.get(f"noname.0.{i}", (0, np.zeros(0)))
                server_error[start : start + values.size] = values
            error = sum(held.errors[i] for _, held in of_round) / 3
            after = of_round[0][1].x[i] - error - server_error.reshape(5, 3)
            moved = before[i] - sum(update[i] for update, _ in of_round) / 3
            assert worst([after], [moved]) < (1e-14 if dtype == torch.float64 else 1e-6)
            before[i] = after


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_frozen_tables_of_other_dtypes_are_left_alone(dtype: torch.dtype) -> None:
    def work(rank: int) -> None:
        weight = nn.Parameter(torch.zeros(3))
        table = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
        optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD([weight, table], lr=0.1))
        for _ in range(2):
            weight.grad = torch.full((3,), 1.0 + rank)
            optimizer.step()
        assert torch.equal(table.float(), torch.ones(3).to(dtype).float())
        assert list(optimizer.state_dict()["hvd_saef"]["x"]) == ["noname.0.0"]

    run_workers(2, work)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(3))
    table = nn.Parameter(torch.zeros(3, dtype=dtype))

    def work(rank: int) -> None:
        named = [("weight", weight), ("lookup.table", table)]
        hvd_saef.DistributedOptimizer(torch.optim.SGD([weight, table], lr=0.1), named_parameters=named)

    with pytest.raises(TypeError, match=f"'lookup.table'.*{dtype}.*float16, bfloat16, float32 and float64"):
        run_workers(2, work)


# -- strides ----------------------------------------------------------------------------------------

STRIDES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # name: (how the parameter lies in a contiguous [4, 6, 5, 8], its elements in the order of the blocks)
    "transposed": (lambda t: t[0, 0].t(), lambda p: p.t().reshape(-1)),
    "permuted": (lambda t: t.permute(2, 0, 3, 1), lambda p: p.permute(1, 3, 0, 2).reshape(-1)),
    "channels_last": (
        lambda t: t.clone(memory_format=torch.channels_last),
        lambda p: p.permute(0, 2, 3, 1).reshape(-1),
    ),
    "a row": (lambda t: t[1, 2], lambda p: p.reshape(-1)),
    "every other": (lambda t: t[:, 1::2, 3, 1:7:2], lambda p: p.reshape(-1)),
    "strided and transposed": (lambda t: t[0, ::2, 0, ::3].t(), lambda p: p.reshape(-1)),
    "one column": (lambda t: t[0, :, :, 0], lambda p: p.reshape(-1)),
    "size one": (lambda t: t[:1, :, 2:3].transpose(0, 1), lambda p: p.reshape(-1)),
}


@pytest.mark.parametrize("name", STRIDES)
@pytest.mark.parametrize("compression", [Compression.sign, Compression.topk(0.1)])
@pytest.mark.parametrize("block_size", [None, 7])
def test_strides(name: str, compression: Compressor, block_size: int | None) -> None:
    """As its contiguous twin, to the bit; and nothing is written beside the parameter."""
    lie, line = STRIDES[name]
    options: dict[str, Any] = {"compression": compression, "block_size": block_size, "averaging_period": 3}
    wholes: list[Tensor] = []

    def strided() -> list[nn.Parameter]:
        wholes.append(normal(4, 6, 5, 8))
        return [nn.Parameter(lie(wholes[-1])), nn.Parameter(normal(3))]

    found = train(strided, **options)
    twins = train(
        lambda: [nn.Parameter(line(lie(normal(4, 6, 5, 8))).clone()), nn.Parameter(normal(3))], **options
    )
    assert agree(found)
    for optimizer, twin in zip(found, twins, strict=True):
        assert optimizer.param_groups[0]["params"][0].stride() == lie(normal(4, 6, 5, 8)).stride()
        for key in ("x", "errors"):
            assert ours(optimizer, key)[0].shape == lie(normal(4, 6, 5, 8)).shape
            assert torch.equal(line(ours(optimizer, key)[0]), ours(twin, key)[0])
            assert torch.equal(ours(optimizer, key)[1], ours(twin, key)[1])
        held, theirs = (o.param_groups[0]["params"][0].detach() for o in (optimizer, twin))
        assert torch.equal(line(held), theirs)
    for whole in wholes:
        mine = torch.zeros_like(whole, dtype=torch.bool)
        lie(mine).fill_(True)  # a copy, for channels_last: then nothing of `whole` is the parameter's
        assert torch.equal(whole[~mine], normal(4, 6, 5, 8)[~mine])


def test_the_order_of_elements_matters() -> None:
    """The counter-test: blocks of a transposed matrix are not those of its logical order."""

    def error(matrix: Tensor) -> Tensor:
        return ours(train(lambda: [nn.Parameter(matrix.clone())], 2, block_size=7)[0], "errors")[0].reshape(
            -1
        )

    transposed = normal(6, 5).t()
    assert torch.equal(error(transposed).sort().values, error(transposed.t().contiguous()).sort().values)
    assert not torch.equal(error(transposed).sort().values, error(transposed.contiguous()).sort().values)


# -- what parameters may be beside ------------------------------------------------------------------


def test_several_groups_are_as_several_optimizers() -> None:
    """Each group with its own learning rate and weight decay."""

    def work(rank: int) -> list[list[Tensor]]:
        results = []
        for together in (True, False):
            parameters = [nn.Parameter(normal(4, 3, seed=i)) for i in range(3)]
            groups: list[dict[str, Any]] = [
                {"params": parameters[:1]},
                {"params": parameters[1:], "lr": 0.01, "weight_decay": 0.1},
            ]
            cut = [groups] if together else [[group] for group in groups]
            bases = [torch.optim.SGD(some, lr=0.1) for some in cut]
            optimizers = [hvd_saef.DistributedOptimizer(base, averaging_period=2) for base in bases]
            for step in range(8):
                for parameter in parameters:
                    parameter.grad = slope(parameter.detach(), rank, step)
                for optimizer in optimizers:
                    optimizer.step()
            results.append([x for optimizer in optimizers for x in ours(optimizer, "x")])
        return results

    for together, apart in run_workers(3, work):
        assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
        assert not torch.equal(together[1], normal(4, 3, seed=1))


class Tied(nn.Module):
    """One weight used twice: under one name, or under two."""

    def __init__(self, two_names: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(normal(4, 4))
        self.frozen = nn.Parameter(normal(4), requires_grad=False)
        self.unused = nn.Parameter(normal(2))
        self.last = nn.Linear(4, 4, bias=False) if two_names else self.first
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Loss of a two-layer network."""
        out: Tensor = self.last(torch.tanh(self.first(x))) + self.frozen
        return out.square().sum()


@pytest.mark.parametrize("compression", [Compression.sign, Compression.topk(0.2)])
@pytest.mark.parametrize("step_ahead", [0.0, 1.0])
def test_tied_frozen_and_unused(compression: Compressor, step_ahead: float) -> None:
    """A tied weight is one parameter; frozen and unused ones keep their bits."""

    def work(rank: int) -> list[Tied]:
        models = [Tied(two_names=True), Tied(two_names=False)]
        for model in models:
            base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
            named = list(model.named_parameters(remove_duplicate=False))
            optimizer = hvd_saef.DistributedOptimizer(
                base, named, compression=compression, step_ahead=step_ahead, averaging_period=3, model=model
            )
            for step in range(10):
                optimizer.zero_grad()
                model(normal(8, 4, seed=100 * step + rank)).backward()
                optimizer.step()
            assert len(ours(optimizer, "x")) == 2
            optimizer.eval()
        return models

    workers = run_workers(3, work)
    for tied, single in workers:
        assert tied.last.weight is tied.first.weight
        assert torch.equal(tied.first.weight, single.first.weight)
        assert torch.equal(tied.first.weight, workers[0][0].first.weight)
        assert not torch.equal(tied.first.weight, normal(4, 4))
        assert torch.equal(tied.frozen, normal(4))
        assert torch.equal(tied.unused, normal(2))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("compression", [Compression.sign, Compression.topk(0.2), Compression.none])
def test_writing_is_seen_by_autograd(compression: Compressor, overlap: bool) -> None:
    """Each step raises every parameter's version, one without gradient too: a stale backward pass fails."""

    def work(rank: int) -> None:
        model = Tied(two_names=False)
        optimizer = hvd_saef.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), compression=compression, model=model, overlap=overlap
        )

        def versions() -> dict[str, int]:
            return {name: p._version for name, p in model.named_parameters() if name != "frozen"}

        for _ in range(3):
            optimizer.zero_grad()
            model(normal(8, 4, seed=rank)).backward()
            before = versions()
            loss = model(normal(8, 4, seed=rank))
            optimizer.step()
            assert all(after > before[name] for name, after in versions().items())
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            assert model.frozen._version == 0
        for move in (optimizer.eval, optimizer.train):
            before = versions()
            move()
            assert all(after > before[name] for name, after in versions().items())
        assert model.frozen._version == 0

    run_workers(2, work)
