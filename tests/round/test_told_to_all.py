"""Collective calls: what goes wrong in one on one rank is raised on all, none hangs, and all can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef.diagnostics import Monitor, auxiliary_point
from hvd_saef.errors import ConfigurationMismatchError, WorkerError
from hvd_saef.round import local_steps, overflow
from tests.round.test_overlap import Training
from tests.workers import NO_MODEL, Run, bits, caught, everything, sgd, together

pytestmark = pytest.mark.filterwarnings(NO_MODEL)
ODD = 1
"""The rank on which something is wrong."""


# -- wrapping ---------------------------------------------------------------------------------------


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(2, 2))]


def failing_choice(name: str, parameter: Tensor) -> Any:
    raise LookupError("no compressor for it")


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"local_steps": 0}, ValueError, "local_steps=0"),
    ({"backward_passes_per_step": 0}, ValueError, "backward_passes_per_step=0"),
    ({"gradient_predivide_factor": 2.0}, ValueError, "gradient_predivide_factor=2.0"),
    ({"model": "mine"}, TypeError, "model='mine'"),
    ({"worker": 3}, TypeError, "worker=3"),
    ({"compression": 3}, TypeError, "compression=3"),
    ({"compression": failing_choice}, LookupError, "no compressor for it"),
    ({"named_parameters": 3}, TypeError, "named_parameters=3"),
    ({"dense_below": -1}, ValueError, "dense_below=-1"),
    ({"optimizer": 3}, TypeError, "optimizer=3"),
    ({"optimizer": sgd(parameters(torch.complex64))}, TypeError, "complex64"),
    (
        {"overlap": True, "feedback": "none", "compression": hvd_saef.Compression.none},
        ValueError,
        "overlap=True",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "words"), WRONG, ids=[row[2] for row in WRONG])
def test_wrapping(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    def fn(rank: int) -> str:
        inner = sgd(parameters())
        arguments: dict[str, Any] = {"optimizer": inner} | (wrong if rank == ODD else {})
        with pytest.raises(error if rank == ODD else WorkerError) as raised:
            hvd_saef.DistributedOptimizer(**arguments)
        optimizer = hvd_saef.DistributedOptimizer(inner)  # once more, and right
        for parameter in inner.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return str(raised.value)

    told = together(3, fn)
    assert all(words in said for said in told)
    assert all(f"rank {ODD} raised {error.__name__}" in told[rank] for rank in (0, 2))


def test_a_failed_wrapping_takes_no_parameters_away() -> None:
    def fn(rank: int) -> dict[str, bytes]:
        run = Run(rank).step(2)
        with pytest.raises((ValueError, WorkerError)):
            hvd_saef.DistributedOptimizer(run.inner, local_steps=0 if rank == ODD else 1)
        return everything(run.step(2))

    assert together(2, fn) == together(2, lambda rank: everything(Run(rank).step(4)))


# -- methods ------------------------------------------------------------------------------------------


def resized(run: Run) -> None:
    """A parameter is not what was wrapped."""
    run.parameters[0].data = run.parameters[0].data.double()


def restored(run: Run) -> None:
    """It is again."""
    run.parameters[0].data = run.parameters[0].data.float()


METHODS: dict[str, Callable[[Any], Any]] = {
    "flush": lambda optimizer: optimizer.flush(),
    "consolidate": lambda optimizer: optimizer.consolidate(),
    "reanchor": lambda optimizer: optimizer.reanchor(),
    "step": lambda optimizer: optimizer.step(),
    "auxiliary_point": lambda optimizer: auxiliary_point(optimizer).__enter__(),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("workers", ["rank", "node"])
def test_methods(method: str, workers: Any) -> None:
    """A parameter that was converted on one rank; nothing changes anywhere."""
    ranks = 2 if workers == "node" else 1

    def fn(rank: int) -> dict[str, bytes]:
        run = Run(rank, worker=workers).step(2)
        if rank == ODD:
            resized(run)
        with pytest.raises(RuntimeError if rank == ODD else WorkerError, match="changed its dtype"):
            METHODS[method](run.optimizer)
        if rank == ODD:
            restored(run)
        return everything(run.step(2))

    plain = together(2, lambda rank: everything(Run(rank, worker=workers).step(4)), ranks)
    assert together(2, fn, ranks) == plain


def test_synchronize() -> None:
    """Where it averages gradients."""
    options: dict[str, Any] = {"feedback": "none", "compression": hvd_saef.Compression.none}

    def fn(rank: int) -> None:
        run = Run(rank, **options).step(2)
        if rank == ODD:
            resized(run)
        with pytest.raises(RuntimeError if rank == ODD else WorkerError, match="changed its dtype"):
            run.optimizer.synchronize()
        if rank == ODD:
            restored(run)
        run.step(2)

    together(3, fn)


@pytest.mark.parametrize("method", ["flush", "reanchor", "consolidate", "auxiliary_point"])
def test_where_one_rank_has_sent(method: str) -> None:
    """With overlap=True; another lacks gradients. All are told, and step() completes the round."""

    def backward(training: Training) -> None:
        training.optimizer.zero_grad()
        layers = training.model if training.rank == ODD else training.model[:3]
        layers(torch.randn(16, 20, generator=training.data)).square().mean().backward()

    def fn(rank: int, tries: bool) -> dict[str, bytes]:
        training = Training(rank).steps(2)
        backward(training)
        if tries:
            assert training.under_way == (rank == ODD)
            words = rf"{method}\(\) between backward and step\(\)"
            words = r"flush\(\) between" if method == "consolidate" else words
            with pytest.raises(RuntimeError if rank == ODD else WorkerError, match=words):
                METHODS[method](training.optimizer)
        training.optimizer.step()
        return bits(training.steps(2).state())

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


# -- functions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "error"), [(-1, ValueError), (1.5, TypeError), ("3", TypeError)])
def test_common_steps(steps: Any, error: type[Exception]) -> None:
    def fn(rank: int) -> None:
        with pytest.raises(error if rank == ODD else WorkerError):
            hvd_saef.common_steps(steps if rank == ODD else 5)
        assert hvd_saef.common_steps(5 + rank) == 5

    together(3, fn)


def norm() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(2))


def batches(fails: bool) -> Iterator[Tensor]:
    yield torch.ones(4, 2)
    if fails:
        raise OSError("disk gone")


def test_recalibrate_batchnorm() -> None:
    """What the loader raises; statistics, modes and momenta are as they were."""

    def fn(rank: int) -> None:
        model = norm()
        model(torch.randn(8, 2, generator=torch.Generator().manual_seed(rank)))
        before = bits(dict(model.state_dict()))
        with pytest.raises(OSError if rank == ODD else WorkerError, match="disk gone"):
            hvd_saef.recalibrate_batchnorm(model, batches(rank == ODD))
        assert bits(dict(model.state_dict())) == before
        assert model.training
        assert model[0].momentum == 0.1
        hvd_saef.recalibrate_batchnorm(model, batches(False))
        assert torch.equal(model[0].get_buffer("running_mean"), torch.ones(2))

    together(3, fn)


def test_recalibrate_batchnorm_of_different_models() -> None:
    def fn(rank: int) -> None:
        model = nn.Sequential(norm(), norm()) if rank == ODD else norm()
        hvd_saef.recalibrate_batchnorm(model, batches(False))

    for failure in caught(3, fn):
        assert isinstance(failure, ConfigurationMismatchError)
        assert "[2] on ranks 0, 2, [2, 2] on rank 1" in str(failure)


@pytest.mark.parametrize("wrong", ["every", "csv"])
def test_monitor(wrong: str, tmp_path: Path) -> None:
    """A file that cannot be written is rank 0's."""
    odd = 0 if wrong == "csv" else ODD

    def fn(rank: int) -> dict[str, bytes]:
        run = Run(rank)
        every = 0 if (wrong, rank) == ("every", odd) else 1
        csv = tmp_path / "no folder" / "mismatch.csv" if wrong == "csv" else None
        error = ValueError if wrong == "every" else OSError
        with pytest.raises(error if rank == odd else WorkerError):
            Monitor(run.optimizer, every=every, csv=csv)
        return everything(run.step(3))

    assert together(2, fn) == together(2, lambda rank: everything(Run(rank).step(3)))


def test_monitors_that_differ_or_are_closed_twice() -> None:
    def fn(rank: int) -> None:
        run = Run(rank)
        with pytest.raises(ConfigurationMismatchError, match="every"):
            Monitor(run.optimizer, every=1 + (rank == ODD))
        monitor = Monitor(run.optimizer, every=1)
        run.step(2)
        monitor.close()
        monitor.close()
        run.step(2)

    together(3, fn)


def test_memory_that_lacks_for_a_copy_of_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient whose square is infinite makes all copy the optimizer's state; one rank cannot."""
    copy_state = overflow.StateCopy

    def copy_or_fail(optimizer: torch.optim.Optimizer) -> Any:
        if optimizer.param_groups[0]["lr"] == 0.25:
            raise MemoryError("no room for the copy")
        return copy_state(optimizer)

    monkeypatch.setattr(local_steps, "StateCopy", copy_or_fail)

    def fn(rank: int) -> None:
        rate = 0.25 if rank == ODD else 0.5

        def make(held: list[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.SGD(held, lr=rate)

        run = Run(rank, make).step()
        run.set_gradients()
        gradient = run.parameters[0].grad
        assert gradient is not None
        gradient.fill_(1e30)
        run.optimizer.step()

    failures = caught(3, fn)
    assert isinstance(failures[ODD], MemoryError)
    others = [failure for rank, failure in enumerate(failures) if rank != ODD]
    assert all(isinstance(failure, WorkerError) for failure in others)
    assert all("rank 1 raised MemoryError: no room for the copy" in str(failure) for failure in others)
