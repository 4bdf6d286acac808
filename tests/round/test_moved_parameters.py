"""Parameters that something else than step() moved: kept or dropped, but never in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hvd_saef
from hvd_saef import WorkerError
from tests.workers import batch, bits, caught, network, sgd, together, train, warned

pytestmark = pytest.mark.filterwarnings("ignore")

NO_STEP = "every rank trains alone"
MOVED = "was changed outside of step()"
AT_X = "were changed while they were at the consensus point x"


class Advancing(torch.optim.SGD):
    """Its own method takes the step."""

    @torch.no_grad()
    def advance(self) -> None:
        """Down."""
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(0.1 * parameter.grad)


def advance(model: torch.nn.Module, optimizer: Any, inner: Any) -> None:
    optimizer.advance()


def step_inner(model: torch.nn.Module, optimizer: Any, inner: Any) -> None:
    inner.step()


def by_hand(model: torch.nn.Module, optimizer: Any, inner: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * parameter.grad)  # type: ignore[operator]


LOOKS: dict[str, Callable[[torch.nn.Module, Any], Any]] = {
    "evaluation": lambda model, optimizer: model.eval()(batch(9, 9)),
    "state dict of the model": lambda model, optimizer: model.state_dict(),
    "state dict of the optimizer": lambda model, optimizer: optimizer.state_dict(),
    "eval()": lambda model, optimizer: optimizer.eval(),
    "step()": lambda model, optimizer: optimizer.step(),
}


def wrapped(**options: Any) -> tuple[torch.nn.Module, Any, Any]:
    model = network()
    inner = Advancing(model.parameters(), lr=0.1)
    given: dict[str, Any] = {"model": model, "server": "replicated"} | options
    return model, hvd_saef.DistributedOptimizer(inner, model.named_parameters(), **given), inner


def backward(model: torch.nn.Module, optimizer: Any, step: int = 0) -> None:
    optimizer.zero_grad()
    model(batch(0, step)).square().mean().backward()


HOROVODS: dict[str, Any] = {"feedback": "none", "compression": hvd_saef.Compression.none}


@pytest.mark.parametrize("options", [{}, HOROVODS], ids=["saef", "none"])
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("move", [advance, step_inner, by_hand])
def test_training_without_step_is_told_once(
    move: Callable[..., None], look: str, options: dict[str, Any]
) -> None:
    def fn(rank: int) -> None:
        model, optimizer, inner = wrapped(**options)
        for step in range(3):
            backward(model.train(), optimizer, step)
            move(model, optimizer, inner)
        for _ in range(2):
            LOOKS[look](model, optimizer)
            optimizer.train()

    texts = warned(2, fn)
    assert sorted(rank for rank, text in texts if NO_STEP in text) == [0, 1]


@pytest.mark.parametrize("with_model", [True, False])
def test_saving_tells_too(tmp_path: Path, with_model: bool) -> None:
    def fn(rank: int) -> None:
        model, optimizer, inner = wrapped(**({} if with_model else {"model": None}))
        backward(model, optimizer)
        by_hand(model, optimizer, inner)
        hvd_saef.save_checkpoint(tmp_path, model, optimizer)

    assert sorted(rank for rank, text in warned(2, fn) if NO_STEP in text) == [0, 1]


def test_what_is_no_step_is_not_taken_for_one() -> None:
    """Loading, drawing and broadcasting before the first gradient, and a dry run without any step."""

    def fn(rank: int) -> None:
        model, optimizer, _ = wrapped()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        model.load_state_dict(network(seed=3).state_dict())
        backward(model, optimizer)
        model.eval()(batch(9, 9))
        model.train()
        backward(model, optimizer)
        model.load_state_dict(network(seed=4).state_dict())
        model.eval()(batch(9, 9))
        for step in range(3):
            train(model.train(), optimizer, rank, step)
            model.state_dict()

    assert not warned(2, fn)


def clamp(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.3, 0.3)


@pytest.mark.parametrize("look", [*LOOKS][:4])
@pytest.mark.parametrize("local_steps", [1, 2])
@pytest.mark.parametrize("options", [{}, {"feedback": "ef"}], ids=["saef", "ef"])
def test_a_change_between_two_steps_outlives_a_look(
    look: str, local_steps: int, options: dict[str, Any]
) -> None:
    """As without the look; and it is told of once, with or without one."""

    def fn(rank: int, looks: bool) -> dict[str, bytes]:
        model, optimizer, _ = wrapped(local_steps=local_steps, **options)
        for step in range(6):
            train(model.train(), optimizer, rank, step)
            clamp(model)
            if looks:
                LOOKS[look](model, optimizer)
                optimizer.train()
        return bits([optimizer.state_dict(), list(model.parameters())])

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))
    if local_steps == 1:  # between local steps nobody can know
        assert [text for _, text in warned(2, lambda rank: fn(rank, True)) if MOVED in text][2:] == []
        assert sorted(r for r, text in warned(2, lambda rank: fn(rank, False)) if MOVED in text) == [0, 1]


@pytest.mark.parametrize("who", [{0, 1}, {1}])
@pytest.mark.parametrize("local_steps", [1, 2])
def test_a_change_before_step_with_overlap_is_told(local_steps: int, who: set[int]) -> None:
    """The update was sent without it."""

    def fn(rank: int) -> None:
        model, optimizer, _ = wrapped(overlap=True, local_steps=local_steps)
        for step in range(5):
            optimizer.zero_grad()
            model(batch(rank, step)).square().mean().backward()
            if rank in who and step:
                optimizer._saef.exchange.wait_until_encoded()
                clamp(model)
            optimizer.step()

    for rank, error in enumerate(caught(2, fn)):
        assert isinstance(error, WorkerError) is (rank not in who)
        assert "changed between backward and step()" in str(error)
        assert "overlap=False" in str(error)


def test_a_change_between_two_steps_is_saved_and_loaded() -> None:
    """The point that was reached is in the state dict, at a round's start too."""

    def fn(rank: int) -> None:
        model, optimizer, _ = wrapped()
        for step in range(3):
            train(model, optimizer, rank, step)
        clamp(model)
        state = optimizer.state_dict()
        reached = bits(list(model.parameters()))
        twin, other, _ = wrapped()
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(state)
        other.train()
        assert bits(list(twin.parameters())) == reached
        for each, its in ((model, optimizer), (twin, other)):
            train(each.train(), its, rank, 3)
        assert bits(other.state_dict()) == bits(optimizer.state_dict())

    together(2, fn)


def test_consolidate_keeps_it() -> None:
    def fn(rank: int) -> None:
        model, optimizer, _ = wrapped()
        for step in range(3):
            train(model, optimizer, rank, step)
        clamp(model)
        reached = bits(list(model.parameters()))
        optimizer.consolidate()
        assert bits(list(model.parameters())) == reached

    together(2, fn)


@pytest.mark.parametrize("local_steps", [1, 2])
def test_a_change_at_x_is_told(local_steps: int) -> None:
    """It is dropped: training goes on from where it was."""

    def fn(rank: int, change: bool) -> dict[str, bytes]:
        model, optimizer, _ = wrapped(local_steps=local_steps)
        for step in range(5):
            train(model.train(), optimizer, rank, step)
            model.state_dict()
            if change and step == 2:
                clamp(model)
        return bits(optimizer.state_dict())

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))
    assert sorted(r for r, text in warned(2, lambda rank: fn(rank, True)) if AT_X in text) == [0, 1]
    assert not warned(2, lambda rank: fn(rank, False))


@pytest.mark.parametrize("consensus", [True, False])
def test_a_moving_average_in_the_parameters_for_an_evaluation(consensus: bool) -> None:
    """Stored, replaced, evaluated and put back: training goes on as if not. Within consensus() it is seen."""

    def fn(rank: int, evaluate: bool) -> dict[str, bytes]:
        model, optimizer, _ = wrapped()
        average = [torch.full_like(p, 0.25) for p in model.parameters()]
        for step in range(4):
            train(model.train(), optimizer, rank, step)
            if evaluate:
                if consensus:
                    optimizer.eval()
                stored = [p.detach().clone() for p in model.parameters()]
                with torch.no_grad():
                    torch._foreach_copy_(list(model.parameters()), average)
                    out = model.eval()(batch(9, 9))
                    if consensus:
                        assert bits(list(model.parameters())) == bits(average)
                        assert float(out.abs().max()) > 0
                    torch._foreach_copy_(list(model.parameters()), stored)
                if consensus:
                    optimizer.train()
        optimizer.train()
        return bits([optimizer.state_dict(), list(model.parameters())])

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))
    texts = warned(2, lambda rank: fn(rank, True))
    assert any(MOVED in text and "consensus()" in text for _, text in texts) is not consensus


def test_ordinary_training_is_not_told_anything() -> None:
    def fn(rank: int) -> None:
        for options in ({}, {"local_steps": 2}, {"overlap": True}, {"averaging_period": 2}):
            model = network()
            optimizer = hvd_saef.DistributedOptimizer(
                sgd(list(model.parameters())),
                model.named_parameters(),
                model=model,
                server="replicated",
                **options,
            )
            for step in range(6):
                train(model.train(), optimizer, rank, step)
                if step % 2:
                    model.eval()(batch(9, 9))
                    optimizer.state_dict()

    assert not warned(2, fn)
