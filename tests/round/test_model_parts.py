"""Models called through their methods and parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from tests.round.test_models import WORKERS, held, train, twin_of, wrapped, x_of
from tests.workers import NO_MODEL, batch, bits, network, sgd, together

pytestmark = pytest.mark.filterwarnings("ignore:the largest block")


class Outer(nn.Module):
    """Holds a model, and calls it from a method that is no forward()."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, inputs: Tensor) -> Tensor:
        """The body."""
        out: Tensor = self.body(inputs)
        return out

    def generate(self, inputs: Tensor) -> Tensor:
        """As language models have it: through self(...)."""
        out: Tensor = self(inputs) * 2
        return out

    def encode(self, inputs: Tensor) -> Tensor:
        """Through a part only."""
        out: Tensor = self.body(inputs) * 2
        return out


B_IS_SEEN = pytest.mark.xfail(
    strict=True, reason="only the given model has hooks: its parts see b in eval mode"
)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    ("call", "consensus"),
    [
        ("generate", False),
        ("generate", True),
        ("encode", True),
        pytest.param("encode", False, marks=B_IS_SEEN),
    ],
)
def test_evaluation_through_methods_and_parts(call: str, consensus: bool, workers: int) -> None:
    """Within consensus() every call sees x."""

    def fn(rank: int) -> None:
        model = Outer()
        optimizer = wrapped(model)
        train(getattr(model, call), optimizer, rank)
        twin = twin_of(Outer, model, optimizer.state_dict()["hvd_saef"]["x"])
        model.eval()
        with torch.no_grad():
            if consensus:
                with optimizer.consensus():
                    out = getattr(model, call)(batch(9, 9))
            else:
                out = getattr(model, call)(batch(9, 9))
            assert bits(out) == bits(getattr(twin, call)(batch(9, 9)))

    together(workers, fn)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.filterwarnings(NO_MODEL)
def test_training_through_a_part_is_training(workers: int) -> None:
    """Also as model= of its own, where the part's eval mode decides."""

    def fn(rank: int, call: str) -> dict[str, bytes]:
        outer = Outer()
        base = sgd(list(outer.parameters()))
        named = outer.named_parameters()
        model = {"whole": outer, "part": outer.body, "none": None}[call]
        optimizer = hvd_saef.DistributedOptimizer(base, named, model=model)
        train(outer.encode, optimizer, rank)
        if call == "part":
            b, x = held(outer), x_of(optimizer)
            outer.eval().encode(batch(9, 9))
            assert held(outer) == x
            assert bits(dict(outer.state_dict())) == x
            outer.train().encode(batch(9, 9))
            assert held(outer) == b
        return held(outer)

    whole = together(workers, lambda rank: fn(rank, "whole"))
    assert whole == together(workers, lambda rank: fn(rank, "part"))
    assert whole == together(workers, lambda rank: fn(rank, "none"))
