"""SAM, as its widely used implementation has it: steps are taken by its own methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import hvd_saef
from tests.workers import NO_MODEL, batch, bits, caught, network, together, warned

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
]

STEPS = 5


class SAM(torch.optim.Optimizer):
    """Two gradients a step, the second taken where the first leads to a larger loss."""

    def __init__(
        self, params: Iterable[Tensor], base: Callable[..., Any], rho: float = 0.05, **options: Any
    ) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Climb."""
        for group in self.param_groups:
            gradients = [p.grad for p in group["params"]]
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Back to where it was, and down from there."""
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Both."""
        assert closure is not None, "SAM needs a closure"
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


class Case:
    """One rank's model, trained by SAM around what `wrap` makes of the base optimizer."""

    def __init__(self, rank: int, wrap: Callable[[Any, Any], Any]) -> None:
        self.rank, self.model = rank, network(torch.float64)
        self.base: Any = None

        def base(groups: Any, **options: Any) -> Any:
            self.base = wrap(torch.optim.SGD(groups, **options), self.model)
            return self.base

        self.sam = SAM(self.model.parameters(), base, lr=0.05, momentum=0.9)

    def loss(self, step: int) -> Tensor:
        """Of this rank's batch."""
        inputs = batch(self.rank, step, torch.float64)
        loss: Tensor = ((self.model(inputs) - inputs[:, :2].cos()) ** 2).mean()
        return loss

    def by_hand(self, step: int) -> None:
        """Both halves of a step."""
        self.loss(step).backward()
        self.sam.first_step(zero_grad=True)
        self.loss(step).backward()
        self.sam.second_step(zero_grad=True)

    def by_closure(self, step: int) -> None:
        """As its documentation has it."""

        def closure() -> Tensor:
            loss = self.loss(step)
            loss.backward()
            return loss

        self.loss(step).backward()
        self.sam.step(closure)
        self.sam.zero_grad()


def plain(inner: Any, model: Any) -> Any:
    return inner


def ours(inner: Any, model: Any, **options: Any) -> Any:
    return hvd_saef.DistributedOptimizer(inner, model.named_parameters(), model=model, **options)


def uncompressed(inner: Any, model: Any) -> Any:
    return ours(inner, model, compression=hvd_saef.Compression.none)


FORMS = [Case.by_hand, Case.by_closure]


@pytest.mark.parametrize("form", FORMS)
def test_the_recipe_is_sam(form: Callable[[Case, int], None]) -> None:
    """Uncompressed, the mean of what two workers of plain SAM do in each round, momentum apart."""

    def fn(rank: int) -> list[Tensor]:
        case = Case(rank, uncompressed)
        for step in range(STEPS):
            form(case, step)
        assert case.base.stats()["rounds"] == STEPS
        return list(case.base.state_dict()["hvd_saef"]["x"].values())

    cases = [Case(rank, plain) for rank in range(2)]
    for step in range(STEPS):
        for case in cases:
            form(case, step)
        with torch.no_grad():
            for pair in zip(*(case.model.parameters() for case in cases), strict=True):
                mean = (pair[0] + pair[1]) / 2
                for parameter in pair:
                    parameter.copy_(mean)
    for mine, theirs in zip(together(2, fn)[0], cases[0].model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_recipe_with_compression_warns_of_nothing(form: Callable[[Case, int], None]) -> None:
    """X is one, looks leave no trace, and no warning comes."""

    def fn(rank: int, look: bool) -> dict[str, bytes]:
        case = Case(rank, lambda inner, model: ours(inner, model, server="replicated"))
        for step in range(STEPS):
            form(case, step)
            if look:
                with torch.no_grad():
                    case.model.eval()(batch(9, 9, torch.float64))
                case.model.state_dict()
                case.model.train()
        case.base.train()
        return bits([case.base.state_dict()["hvd_saef"]["x"], list(case.model.parameters())])

    assert not warned(2, lambda rank: fn(rank, True))
    (first, second), plainly = together(2, lambda rank: fn(rank, True)), together(2, lambda r: fn(r, False))
    assert [first, second] == plainly
    assert {k: v for k, v in first.items() if k < "/1"} == {k: v for k, v in second.items() if k < "/1"}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_with_overlap_it_is_refused(form: Callable[[Case, int], None], passes: int) -> None:
    """Its second_step() moves what the first bucket's update has been sent of."""

    def fn(rank: int) -> None:
        options = {"overlap": True, "backward_passes_per_step": passes}
        case = Case(rank, lambda inner, model: ours(inner, model, **options))
        for step in range(STEPS):
            form(case, step)

    said = [str(error) for error in caught(2, fn)]
    words = {1: "a second backward pass", 2: "changed between backward and step()"}[passes]
    assert any(words in text and "overlap=True" in text for text in said), said
    if passes == 2:  # agreed on by all; the other is raised in backward()
        assert all(words in text for text in said), said


def wrapped_around(rank: int, form: str) -> None:
    """SAM wrapped itself, which exchanges nothing."""
    case = Case(rank, plain)
    case.sam = ours(case.sam, case.model)
    for step in range(2):
        getattr(case, form)(step)


@pytest.mark.parametrize("workers", [1, 2])
def test_sam_wrapped_itself_is_told(workers: int) -> None:
    """And what to wrap instead."""
    for error in caught(workers, lambda rank: wrapped_around(rank, "by_hand")):
        assert isinstance(error, RuntimeError)
        assert "a step of the SGD that SAM holds, past SAM.step()" in str(error)
        assert "Give the SGD that SAM holds to hvd_saef.DistributedOptimizer" in str(error)


def test_sam_wrapped_itself_with_a_closure_is_told() -> None:
    for error in caught(2, lambda rank: wrapped_around(rank, "by_closure")):
        assert "SAM needs a closure" in str(error)
        assert "Give the SGD that SAM holds to hvd_saef.DistributedOptimizer" in str(error)


class Slow(torch.optim.Optimizer):
    """An optimizer around another whose step() is all there is, as Lookahead's."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The other's."""
        return self.inner.step(closure)


def test_an_optimizer_that_steps_another_within_step_goes() -> None:
    def fn(rank: int, slow: bool) -> dict[str, bytes]:
        model = network()
        inner: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = ours(Slow(inner) if slow else inner, model)
        for step in range(3):
            optimizer.zero_grad()
            model(batch(rank, step)).square().mean().backward()
            optimizer.step()
        return bits(optimizer.state_dict()["hvd_saef"]["x"])

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))
