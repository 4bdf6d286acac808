"""Models of many kinds with model=: evaluation sees x, training sees b, and copies are of what is there."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import hvd_saef
from tests.workers import batch, bits, network, through_torch_save, together

pytestmark = pytest.mark.filterwarnings("ignore:the largest block")

WORKERS = [1, 2, 4]


SEEDING = threading.Lock()
"""Workers that are threads share torch's random state."""


def seeded(model: nn.Module) -> nn.Module:
    """The same numbers on every worker and in every twin."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def normed(norm: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A network whose first layer is parametrized."""
    model = network()
    with SEEDING, torch.random.fork_rng():
        torch.manual_seed(0)  # spectral norm's vectors
        norm(model.get_submodule("0"))  # type: ignore[arg-type]
    return model


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """There and back."""
        out: Tensor = self.last(torch.tanh(self.first(inputs)))
        return out


class Recurrent(nn.Module):
    """An LSTM, which keeps references to its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """The batch as one sequence."""
        out: Tensor = self.lstm(inputs[None])[0][0]
        return out


class Attention(nn.Module):
    """A layer that takes another path in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """The batch as one sequence."""
        out: Tensor = self.layer(inputs[None])[0]
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": network,
    "batch norm": lambda: nn.Sequential(network(), nn.BatchNorm1d(2), network_of(2)),
    "weight norm": lambda: normed(parametrizations.weight_norm),
    "spectral norm": lambda: normed(parametrizations.spectral_norm),
    "tied": lambda: seeded(Tied()),
    "lstm": lambda: seeded(Recurrent()),
    "attention": lambda: seeded(Attention()),
}


def network_of(width: int) -> nn.Module:
    """A layer."""
    return seeded(nn.Linear(width, width))


def wrapped(model: nn.Module, **options: Any) -> Any:
    """SGD on all of the model."""
    base = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    return hvd_saef.DistributedOptimizer(base, model.named_parameters(), model=model, **options)


def train(call: Callable[[Tensor], Tensor], optimizer: Any, rank: int, steps: int = 4) -> None:
    """Some steps through whatever one calls."""
    for step in range(steps):
        optimizer.zero_grad()
        (call(batch(rank, step)) ** 2).mean().backward()
        optimizer.step()


def held(model: nn.Module) -> dict[str, bytes]:
    """The bits of the parameters."""
    return bits(dict(model.named_parameters()))


def x_of(optimizer: Any) -> dict[str, bytes]:
    """The bits of x."""
    return bits(optimizer.state_dict()["hvd_saef"]["x"])


def twin_of(make: Callable[[], nn.Module], model: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """Another model without hooks, with these parameters and the model's buffers."""
    twin = make()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(parameters[name])
        for mine, theirs in zip(twin.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
    return twin


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"local_steps": 3}], ids=str)
def test_evaluation_sees_x_and_training_b(name: str, workers: int, options: dict[str, Any]) -> None:
    make = MODELS[name]

    def fn(rank: int) -> dict[str, bytes]:
        model = make()
        optimizer = wrapped(model, **options)
        train(model, optimizer, rank)
        b = {name: p.detach().clone() for name, p in model.named_parameters()}
        x = optimizer.state_dict()["hvd_saef"]["x"]
        assert bits(b) != bits(x)
        with torch.no_grad():
            for _ in range(2):
                at_x, at_b = (twin_of(make, model, parameters) for parameters in (x, b))
                out = bits(model.eval()(batch(9, 9)))
                assert out == bits(at_x.eval()(batch(9, 9)))
                assert out != bits(at_b.eval()(batch(9, 9)))
                assert bits(dict(model.state_dict())) == bits(dict(at_x.state_dict()))
                out = bits(model.train()(batch(9, 9)))
                assert out == bits(at_b.train()(batch(9, 9)))
                assert held(model) == bits(b)
        return x_of(optimizer)

    first, *others = together(workers, fn)
    assert all(other == first for other in others)


# -- copies ------------------------------------------------------------------------------------------------


def through_state_dict(model: nn.Module) -> nn.Module:
    """Loaded into a model that trained elsewhere."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(3.0)
    other.load_state_dict(model.state_dict())
    return other


COPIES = [copy.deepcopy, through_torch_save, through_state_dict]
STRAIGHT = "copied straight from training"


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    ("copied", "how"),
    [
        *((c, how) for c in COPIES for how in ("consensus", "eval of the optimizer", "evaluated before")),
        *((c, STRAIGHT) for c in COPIES),
    ],
)
def test_copies_are_x(copied: Callable[[nn.Module], nn.Module], how: str, workers: int) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        for name in ("batch norm", "weight norm", "tied"):
            if name == "weight norm" and copied is through_torch_save:
                continue  # which torch refuses
            model = MODELS[name]()
            optimizer = wrapped(model)
            train(model, optimizer, rank)
            b, x = held(model), x_of(optimizer)
            assert b != x
            if how == "consensus":
                with optimizer.consensus():
                    twin = copied(model)
            elif how == "eval of the optimizer":
                optimizer.eval()
                twin = copied(model)
                optimizer.train()
            elif how == "evaluated before":
                with torch.no_grad():
                    model.eval()(batch(rank, 8))
                twin = copied(model.train())
            else:
                twin = copied(model)
            assert held(twin) == x
            optimizer.train()
            model(batch(rank, 8))
            assert held(model) == b
            assert held(twin) == x
            before = x_of(optimizer)
            wrapped(twin, feedback="ef")  # a copy can be trained on its own
            train(model, optimizer, rank, 1)
            assert x_of(optimizer) != before
            assert held(twin) == x
        return held(twin)

    first, *others = together(workers, fn)
    assert all(other == first for other in others)
