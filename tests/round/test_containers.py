"""model= as a list of modules or a container that is never called: two generators under one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from tests.workers import batch, bits, draw, together, warned

pytestmark = pytest.mark.filterwarnings("ignore:the largest block")


class Pair(nn.Module):
    """Two generators, without a forward of its own; and a number of its own."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"first": first, "second": nn.ModuleList([second])})
        self.scale = nn.Parameter(torch.ones(3))


Given = Callable[[nn.Module, nn.Module], Any]
GIVEN: dict[str, Given] = {
    "list": lambda first, second: [first, second],
    "tuple": lambda first, second: (first, second),
    "ModuleList": lambda first, second: nn.ModuleList([first, second]),
    "ModuleDict": lambda first, second: nn.ModuleDict({"a": first, "b": second}),
    "nested": Pair,
}


class Gan:
    """One rank's two generators and one discriminator, with an optimizer each side."""

    def __init__(self, rank: int, given: str, **options: Any) -> None:
        self.rank = rank
        self.generators = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(2)]
        self.discriminator = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        for seed, module in enumerate((*self.generators, self.discriminator)):
            draw(module, seed)
        self.given = GIVEN[given](*self.generators)
        self.holder = nn.ModuleList(self.given) if isinstance(self.given, Sequence) else self.given
        self.g: Any = self._wrap(self.holder, self.given, **options)
        self.d: Any = self._wrap(self.discriminator, self.discriminator, **options)

    @staticmethod
    def _wrap(module: nn.Module, given: Any, **options: Any) -> Any:
        inner = torch.optim.Adam(module.parameters(), lr=0.01)
        return hvd_saef.DistributedOptimizer(inner, module.named_parameters(), model=given, **options)

    def step(self, number: int) -> None:
        """The discriminator's step, then the generators'."""
        real = batch(self.rank, number)
        fakes = [generator(batch(self.rank, number + 50)) for generator in self.generators]
        self.d.zero_grad()
        scores = [self.discriminator(fake.detach()) for fake in fakes]
        loss: Tensor = sum((score.exp().mean() for score in scores), -self.discriminator(real).mean())
        loss.backward()
        self.d.step()
        self.g.zero_grad()
        sum(-self.discriminator(fake).mean() for fake in fakes).backward()
        self.g.step()

    def held(self) -> dict[str, bytes]:
        """The generators' parameters."""
        return bits(dict(self.holder.named_parameters()))

    def x(self) -> dict[str, bytes]:
        """Their consensus point."""
        return bits(self.g.state_dict()["hvd_saef"]["x"])


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("options", [{}, {"local_steps": 2}], ids=str)
def test_generators_are_evaluated_at_x_and_trained_at_b(given: str, options: dict[str, Any]) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        gan = Gan(rank, given, **options)
        for number in range(3):
            gan.step(number)
        b, x = gan.held(), gan.x()
        assert b != x
        for generator in gan.generators:
            with torch.no_grad():
                generator.eval()(batch(9, 9))
                assert gan.held() == x
                generator.train()(batch(9, 9))
                assert gan.held() == b
        for saved in (gan.holder, *gan.generators):
            saved.state_dict()
            assert gan.held() == x
            gan.step(3)
            b, x = gan.held(), gan.x()
            assert b != x
        return x

    first, second = together(2, fn)
    assert first == second


@pytest.mark.parametrize("given", GIVEN)
def test_looks_leave_no_trace(given: str) -> None:
    def fn(rank: int, look: bool) -> dict[str, bytes]:
        gan = Gan(rank, given)
        for number in range(5):
            gan.step(number)
            if look:
                gan.holder.state_dict()
                with torch.no_grad():
                    gan.generators[number % 2].eval()(batch(9, 9))
                gan.holder.train()
        gan.g.train()
        return bits([gan.g.state_dict(), list(gan.holder.parameters())])

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


@pytest.mark.parametrize("given", GIVEN)
def test_what_is_loaded_into_one_is_x(given: str) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        gan = Gan(rank, given)
        for number in range(2):
            gan.step(number)
        other = bits(gan.generators[1].state_dict())
        gan.generators[0].load_state_dict({k: v + 1 for k, v in gan.generators[0].state_dict().items()})
        loaded = bits(dict(gan.generators[0].state_dict()))
        assert bits(dict(gan.generators[1].state_dict())) == other
        gan.holder.train()
        gan.generators[0](batch(rank, 9))
        assert bits(dict(gan.generators[0].named_parameters())) == loaded
        gan.step(3)
        return gan.x()

    assert any("a state was loaded into the model" in text for _, text in warned(2, fn))
    first, second = together(2, fn)
    assert first == second


def test_one_within_the_other_is_refused() -> None:
    outer = nn.Sequential(nn.Linear(4, 2))

    def fn(rank: int) -> None:
        inner = torch.optim.SGD(outer.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="Linear is given, and is a part of Sequential"):
            hvd_saef.DistributedOptimizer(inner, model=[outer, outer[0]])
        with pytest.raises(TypeError, match="a list of them or None"):
            hvd_saef.DistributedOptimizer(inner, model=[outer, "a name"])  # type: ignore[list-item]

    together(1, fn)
