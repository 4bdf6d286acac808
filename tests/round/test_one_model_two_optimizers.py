"""Two optimizers over one model, each given all of its names: Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from tests.workers import batch, bits, caught, draw, together, warned

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 4
MUON: Any = getattr(torch.optim, "Muon", torch.optim.SGD)  # torch has it since 2.9


class Both:
    """One rank's model and its two optimizers."""

    def __init__(self, rank: int, **options: Any) -> None:
        self.rank = rank
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
        draw(self.model, 3)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if p.dim() != 2]
        self.optimizers: list[Any] = [
            hvd_saef.DistributedOptimizer(inner, self.model.named_parameters(), model=self.model, **options)
            for inner in (MUON(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.02))
        ]

    def loss(self, step: int) -> Tensor:
        """Of this rank's batch."""
        inputs = batch(self.rank, step)
        loss: Tensor = ((self.model(inputs) - inputs[:, :2].cos()) ** 2).mean()
        return loss

    def train(self, first: int = 0, steps: int = STEPS, look: bool = False) -> None:
        """Some steps of both."""
        for step in range(first, first + steps):
            self.model.train()
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.loss(step).backward()
            for optimizer in self.optimizers:
                optimizer.step()
                if look:
                    self.evaluate()

    def evaluate(self) -> dict[str, bytes]:
        """What an evaluation sees and gives."""
        with torch.no_grad():
            out = self.model.eval()(batch(9, 9))
            self.model.train()
        parameters = bits(dict(self.model.named_parameters()))
        return parameters | bits({"state": dict(self.model.state_dict()), "out": out})

    def x(self) -> dict[str, Tensor]:
        """By the model's names."""
        return {
            name: x
            for optimizer in self.optimizers
            for name, x in optimizer.state_dict()["hvd_saef"]["x"].items()
        }

    def everything(self) -> dict[str, bytes]:
        """All of the state."""
        for optimizer in self.optimizers:
            optimizer.train()
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return bits([states, list(self.model.parameters())])


@pytest.mark.parametrize("options", [{}, {"local_steps": 2}, {"overlap": True}], ids=str)
def test_evaluation_is_at_both_x(options: dict[str, Any]) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        both = Both(rank, **options)
        for first in range(3):
            both.train(first, steps=1)
            x = both.x()
            assert x.keys() == dict(both.model.named_parameters()).keys()
            b = bits(dict(both.model.named_parameters()))
            both.evaluate()
            assert bits(dict(both.model.named_parameters())) == bits(x) != b
            both.loss(0)
            assert bits(dict(both.model.named_parameters())) == b
        return bits(x)

    first, second = together(2, fn)
    assert first == second


@pytest.mark.parametrize("options", [{}, {"local_steps": 2}], ids=str)
def test_looks_leave_no_trace(options: dict[str, Any]) -> None:
    def fn(rank: int, look: bool) -> dict[str, bytes]:
        both = Both(rank, **options)
        both.train(look=look)
        return both.everything()

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


def test_nothing_is_warned_of() -> None:
    texts = warned(2, lambda rank: Both(rank, server="replicated").train(look=True))
    assert not [text for _, text in texts if "AdamW divides" not in text]


def test_checkpoints_of_both(tmp_path: Path) -> None:
    """One folder each; training goes on to the bit."""

    def save(both: Both) -> None:
        for number, optimizer in enumerate(both.optimizers):
            hvd_saef.save_checkpoint(tmp_path / str(number), both.model, optimizer)

    def fn(rank: int) -> dict[str, bytes]:
        both = Both(rank)
        both.train()
        save(both)
        both.train(STEPS)
        return both.everything()

    def resumed(rank: int) -> dict[str, bytes]:
        both = Both(rank)
        for number, optimizer in enumerate(both.optimizers):
            hvd_saef.load_checkpoint(tmp_path / str(number), both.model, optimizer)
        both.train(STEPS)
        return both.everything()

    assert together(2, fn) == together(2, resumed)


@pytest.mark.parametrize("given", ["model", "part"])
def test_statistics_are_taken_at_both_x(given: str) -> None:
    """Also for a part of the model, whose optimizers have more."""

    def fn(rank: int) -> dict[str, bytes]:
        both = Both(rank)
        both.train()
        b = bits(dict(both.model.named_parameters()))
        seen: list[dict[str, bytes]] = []
        module = both.model if given == "model" else both.model[:2]
        handle = both.model[1].register_forward_hook(
            lambda *_: seen.append(bits(dict(both.model.named_parameters())))
        )
        hvd_saef.recalibrate_batchnorm(module, [batch(rank, step) for step in range(2)])
        handle.remove()
        assert seen == 2 * [bits(both.x())]
        assert bits(dict(both.model.named_parameters())) == b
        return bits([both.model[1].running_mean, both.model[1].running_var])

    first, second = together(2, fn)
    assert first == second


def test_a_parameter_of_two_is_refused_as_ever() -> None:
    def fn(rank: int) -> None:
        model = nn.Linear(4, 2)
        earlier, _ = (
            hvd_saef.DistributedOptimizer(
                torch.optim.SGD(parameters, lr=0.1), model.named_parameters(), model=model
            )
            for parameters in (list(model.parameters()), [model.bias])
        )
        model(batch(rank, 0)).mean().backward()
        earlier.step()

    for error in caught(2, fn):
        assert "'bias' was wrapped again" in str(error)


def test_one_that_was_wrapped_again_moves_nothing_any_more() -> None:
    """Not by its methods, nor by hooks that it left on another module than the later one's."""

    def fn(rank: int) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        draw(model, 1)

        def wrap(of: nn.Module) -> Any:
            inner = torch.optim.SGD(model.parameters(), lr=0.1)
            return hvd_saef.DistributedOptimizer(inner, model.named_parameters(), model=of)

        def step(optimizer: Any, number: int) -> None:
            optimizer.zero_grad()
            model(batch(rank, number)).square().mean().backward()
            optimizer.step()

        earlier = wrap(model[0])
        step(earlier, 0)
        later = wrap(model)
        for number in range(2):
            step(later, number)
        b = bits(list(model.parameters()))
        earlier.train()
        assert bits(list(model.parameters())) == b
        earlier.eval()
        with earlier.consensus():
            pass
        assert bits(list(model.parameters())) == b
        model.eval()(batch(rank, 1))
        assert bits(dict(model.named_parameters())) == bits(later.state_dict()["hvd_saef"]["x"])

    together(2, fn)
