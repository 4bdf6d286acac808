"""A look at x between a forward pass and its backward is told in our words; all else goes on as ever."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hvd_saef
from tests.workers import batch, bits, network, sgd, together, warned

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = "the parameters were moved between a forward pass and its backward pass"


def wrapped(model: nn.Module, **options: Any) -> Any:
    return hvd_saef.DistributedOptimizer(
        sgd(list(model.parameters())), model.named_parameters(), model=model, **options
    )


def step(model: nn.Module, optimizer: Any, number: int = 0) -> None:
    optimizer.zero_grad()
    model(batch(0, number)).square().mean().backward()
    optimizer.step()


def evaluate(model: nn.Module, optimizer: Any) -> None:
    with torch.no_grad():
        model.eval()(batch(9, 9))
    model.train()


def save(model: nn.Module, optimizer: Any) -> None:
    model.state_dict()


def go_to_x(model: nn.Module, optimizer: Any) -> None:
    optimizer.eval()


def there_and_back(model: nn.Module, optimizer: Any) -> None:
    with optimizer.consensus():
        pass


def teach(model: nn.Module, optimizer: Any) -> None:
    """A teacher's forward pass in eval mode, then the next student's."""
    evaluate(model, optimizer)
    model(batch(0, 3))


LOOKS = [evaluate, save, go_to_x, there_and_back, teach]


@pytest.mark.parametrize("look", LOOKS)
def test_our_words(look: Callable[[nn.Module, Any], None]) -> None:
    def fn(rank: int) -> None:
        model = network()
        optimizer = wrapped(model)
        step(model, optimizer)
        loss = model(batch(rank, 1)).square().mean()
        look(model, optimizer)
        with pytest.raises(RuntimeError, match=WORDS) as caught:
            loss.backward()
        assert "Evaluate before the forward pass" in str(caught.value)
        optimizer.train()
        step(model, optimizer, 2)  # and goes on

    together(2, fn)


@dataclass
class Outputs:
    """What models with many outputs give."""

    logits: Tensor
    hidden: list[Tensor]


class Several(nn.Module):
    """Its outputs are in containers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = network(), how

    def forward(self, inputs: Tensor) -> Any:
        """The same outputs in many shapes."""
        out = self.body(inputs)
        return {"dict": {"out": out, "n": 3}, "tuple": (1, [out]), "dataclass": Outputs(out, [])}[self.how]


@pytest.mark.parametrize("how", ["dict", "tuple", "dataclass"])
def test_outputs_of_any_shape(how: str) -> None:
    def fn(rank: int) -> None:
        model = Several(how)
        optimizer = wrapped(model)

        def out() -> Tensor:
            given = model(batch(rank, 0))
            found: Tensor = {"dict": lambda: given["out"], "tuple": lambda: given[1][0]}.get(
                how, lambda: given.logits
            )()
            return found

        out().mean().backward()
        optimizer.step()
        loss = out().square().mean()
        model.state_dict()
        with pytest.raises(RuntimeError, match=WORDS):
            loss.backward()

    together(1, fn)


@pytest.mark.parametrize("options", [{"feedback": "ef"}, {"step_ahead": 0.0}, {"feedback": "none"}], ids=str)
@pytest.mark.parametrize("look", LOOKS[:4])
def test_where_x_is_where_training_is_nothing_moves(
    look: Callable[[nn.Module, Any], None], options: dict[str, Any]
) -> None:
    """Without a step ahead an evaluation in between is as harmless as with Horovod."""

    def fn(rank: int, looks: bool) -> dict[str, bytes]:
        model = network()
        optimizer = wrapped(model, **options)
        for number in range(4):
            optimizer.zero_grad()
            loss = model(batch(rank, number)).square().mean()
            if looks:
                look(model, optimizer)
            loss.backward()
            optimizer.train()
            optimizer.step()
        return bits([optimizer.state_dict(), list(model.parameters())])

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


# -- what goes on as ever -------------------------------------------------------------------------------


def two_forwards(model: nn.Module, rank: int, number: int) -> None:
    first, second = model(batch(rank, number)), model(batch(rank, number + 9))
    (first - second).square().mean().backward()


def backward_twice(model: nn.Module, rank: int, number: int) -> None:
    loss = model(batch(rank, number)).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def penalty(model: nn.Module, rank: int, number: int) -> None:
    inputs = batch(rank, number).requires_grad_()
    (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
    slope.square().mean().backward()


def checkpointed(reentrant: bool, model: nn.Module, rank: int, number: int) -> None:
    inputs = batch(rank, number).requires_grad_()
    out: Any = checkpoint(model, inputs, use_reentrant=reentrant)
    out.square().mean().backward()


def parts_checkpointed(model: nn.Module, rank: int, number: int) -> None:
    assert isinstance(model, nn.Sequential)
    hidden: Any = checkpoint(model[:2], batch(rank, number), use_reentrant=False)
    model[2](hidden).square().mean().backward()


WAYS: dict[str, Callable[[nn.Module, int, int], None]] = {
    "two forward passes": two_forwards,
    "backward twice": backward_twice,
    "gradient penalty": penalty,
    "checkpoint": lambda *args: checkpointed(False, *args),
    "reentrant checkpoint": lambda *args: checkpointed(True, *args),
    "checkpointed parts": parts_checkpointed,
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(way: str) -> None:
    """With looks between the steps as without model= and looks."""

    def fn(rank: int, look: bool) -> dict[str, bytes]:
        model = network()
        named = model.named_parameters()
        options: dict[str, Any] = {"model": model} if look else {}
        optimizer = hvd_saef.DistributedOptimizer(sgd(list(model.parameters())), named, **options)
        for number in range(4):
            optimizer.zero_grad()
            WAYS[way](model, rank, number)
            optimizer.step()
            if look:
                evaluate(model, optimizer)
                save(model, optimizer)
                optimizer.train()  # where only parts are called, no hook is
        return bits([optimizer.state_dict(), list(model.parameters())])

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


def test_functional_calls() -> None:
    """torch.func sees the hooks, and gives what it gives without them."""

    def fn(rank: int) -> None:
        model = network()
        optimizer = wrapped(model)
        step(model, optimizer)
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(model, parameters, (inputs,))
            return out.square().mean()

        inputs = batch(rank, 1)
        slopes = torch.func.grad(loss)(parameters, inputs)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(slopes[name], parameter.grad)
            torch.testing.assert_close(each[name].mean(0), parameter.grad)

    together(1, fn)


def test_nothing_is_kept_alive() -> None:
    """Neither outputs by the hooks, nor the optimizer by a graph that outlives it."""

    def fn(rank: int) -> None:
        model = network()
        optimizer = wrapped(model)
        step(model, optimizer)
        out = model(batch(rank, 1))
        output, modes = weakref.ref(out), weakref.ref(optimizer._saef.modes)
        loss = out.mean()  # which does not need them
        model_gone = weakref.ref(model)
        del out, optimizer, model
        assert output() is None
        gc.collect()
        assert model_gone() is None
        assert modes() is None
        loss.backward()

    together(1, fn)


def test_outputs_can_be_saved() -> None:
    def fn(rank: int) -> None:
        import io

        model = network()
        optimizer = wrapped(model)
        step(model, optimizer)
        torch.save(model(batch(rank, 1)).clone(), io.BytesIO())
        torch.save(model(batch(rank, 1)), io.BytesIO())

    assert not [text for _, text in warned(1, fn) if "hook" in text]
