"""GracefulStop: whoever is signalled, all stop after the same step, and go on to the bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef import GracefulStop
from hvd_saef.transport.communicator import SoloCommunicator
from hvd_saef.transport.find import set_thread_communicator
from tests.workers import DEADLINE, together

STEPS = 9


def training(**options: Any) -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, hvd_saef.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), model=model, **options
    )


def take_step(model: nn.Module, optimizer: Any, rank: int, step: int) -> None:
    optimizer.zero_grad()
    inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(100 * rank + step))
    model(inputs).square().sum().backward()
    optimizer.step()


def at_x(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


@pytest.fixture
def alone() -> Iterator[None]:
    """This thread is a job of one worker."""
    set_thread_communicator(SoloCommunicator())
    yield
    set_thread_communicator(None)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"local_steps": 4},
    {"overlap": True},
    {"averaging_period": 2},
    {"worker": [[0, 1], [2]], "weights": "ranks"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_stop_after_the_same_step_and_go_on_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    def run(rank: int) -> tuple[int, list[Tensor]]:
        model, optimizer = training(**options)
        for step in range(STEPS):
            take_step(model, optimizer, rank, step)
        return STEPS, at_x(model)

    def interrupted(rank: int) -> tuple[int, list[Tensor]]:
        model, optimizer = training(**options)
        with GracefulStop(optimizer, signals=()) as stop:
            for step in range(STEPS):
                if (rank, step) == (2, 5):
                    stop.request()
                take_step(model, optimizer, rank, step)
                if stop.requested:
                    hvd_saef.save_checkpoint(tmp_path, model, optimizer, step=step + 1)
                    with pytest.raises(SystemExit) as end:
                        stop.exit()
                    assert end.value.code == 75
                    return step + 1, at_x(model)
        raise AssertionError("did not stop")

    def resumed(rank: int) -> tuple[int, list[Tensor]]:
        model, optimizer = training(**options)
        step = first = hvd_saef.load_checkpoint(tmp_path, model, optimizer)["step"]
        for step in range(first, STEPS):
            take_step(model, optimizer, rank, step)
        return first, at_x(model)

    whole, parts, rest = together(3, run), together(3, interrupted), together(3, resumed)
    assert [step for step, _ in parts] == [step for step, _ in rest] == [6, 6, 6]
    for (_, expected), (_, stopped), (_, found) in zip(whole, parts, rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(expected, stopped, strict=True))


@pytest.mark.parametrize("asks_before", ["first", "second"])
def test_several_optimizers(asks_before: str) -> None:
    def run(rank: int) -> list[bool]:
        first, second = training(), training()
        seen = []
        with GracefulStop(first[1], second[1], signals=()) as stop:
            for step in range(3):
                for name, (model, optimizer) in (("first", first), ("second", second)):
                    if (rank, step, name) == (1, 1, asks_before):
                        stop.request()
                    take_step(model, optimizer, rank, step)
                seen.append(stop.requested)
        return seen

    assert together(2, run) == [[False, True, True]] * 2


def test_a_skipped_step_tells_too() -> None:
    def run(rank: int) -> bool:
        _, optimizer = training(on_nonfinite="skip")
        with GracefulStop(optimizer, signals=()) as stop:
            if rank == 0:
                stop.request()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.full_like(parameter, float("nan") if rank == 1 else 1.0)
            optimizer.step()
            assert optimizer.stats()["skipped"] == 1
            return stop.requested

    assert together(2, run) == [True, True]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals(number: signal.Signals, alone: None) -> None:
    model, optimizer = training()
    noticed: list[int] = []
    earlier = signal.signal(number, lambda *_: noticed.append(1))
    try:
        with GracefulStop(optimizer) as stop:
            take_step(model, optimizer, 0, 0)
            assert not stop.requested
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # twice
            assert not stop.requested  # not before all know
            take_step(model, optimizer, 0, 1)
            assert stop.requested
        assert not noticed
        os.kill(os.getpid(), number)
        assert noticed  # the handler is back
        with GracefulStop(optimizer) as stop:  # a new run starts anew
            take_step(model, optimizer, 0, 2)
            assert not stop.requested
            with pytest.raises(RuntimeError, match="before the ranks agreed"):
                stop.exit()
    finally:
        signal.signal(number, earlier)


def test_a_fork_ends_on_sigterm_and_ignores_sigusr1(alone: None) -> None:
    model, optimizer = training()
    with GracefulStop(optimizer) as stop:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(2 * DEADLINE,))
        child.start()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGUSR1)
        child.join(0.3)
        assert child.is_alive()
        child.terminate()
        child.join(DEADLINE)
        assert child.exitcode == -signal.SIGTERM
        take_step(model, optimizer, 0, 0)
        assert not stop.requested


def test_mistakes(alone: None) -> None:
    model, optimizer = training()
    with pytest.raises(ValueError, match="pass the optimizer"):
        GracefulStop()
    with pytest.raises(TypeError, match="SGD was given; what hvd_saef"):
        GracefulStop(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="exit_code=256: 0 to 255"):
        GracefulStop(optimizer, exit_code=256)
    with pytest.raises(ValueError, match="SIGKILL"):
        GracefulStop(optimizer, signals=[signal.SIGKILL])


def test_outside_the_main_thread() -> None:
    def run(rank: int) -> None:
        _, optimizer = training()
        with pytest.raises(RuntimeError, match="pass signals="), GracefulStop(optimizer):
            pass

    together(1, run)


def test_a_huge_gradient_is_no_signal(alone: None) -> None:
    """What one worker says to the others is one thing each."""
    model, optimizer = training(on_nonfinite="skip")
    with GracefulStop(optimizer) as stop:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e25)
        optimizer.step()
        assert not stop.requested
