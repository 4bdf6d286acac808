"""Checkpoints of two optimizers over one model, as Muon for matrices and AdamW for the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hvd_saef
from tests.workers import adamw, bits, draw, sgd, together

pytestmark = pytest.mark.filterwarnings("ignore:the largest block")


class Pair:
    """A model whose matrices one optimizer trains, and whose vectors another."""

    def __init__(self, rank: int, seed: int = 0, **options: Any) -> None:
        self.rank, self.taken = rank, 0
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        draw(self.model, seed)
        parameters = list(self.model.parameters())
        parts = [p for p in parameters if p.dim() == 2], [p for p in parameters if p.dim() == 1]
        self.optimizers: list[Any] = [
            hvd_saef.DistributedOptimizer(
                make(part), self.model.named_parameters(), model=self.model, **options
            )
            for make, part in zip((sgd, adamw), parts, strict=True)
        ]

    def step(self, times: int) -> Pair:
        """Some steps of both."""
        self.model.train()
        for _ in range(times):
            generator = torch.Generator().manual_seed(100 * self.taken + self.rank)
            self.model.zero_grad()
            self.model(torch.randn(6, 3, generator=generator)).square().mean().backward()
            for optimizer in self.optimizers:
                optimizer.step()
            self.taken += 1
        return self

    def everything(self) -> dict[str, bytes]:
        """The bits of the model at x and of both state dicts."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        return bits({"model": dict(self.model.state_dict()), "optimizers": states})


@pytest.mark.filterwarnings("ignore:a state was loaded into the model")
@pytest.mark.parametrize("options", [{}, {"local_steps": 3}], ids=str)
@pytest.mark.parametrize("workers", [1, 3])
def test_each_in_a_folder_of_its_own(workers: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Both saved at one point go on to the bit, in a new job and in the same one."""

    def load(pair: Pair) -> Pair:
        for i, optimizer in enumerate(pair.optimizers):
            extra = hvd_saef.load_checkpoint(tmp_path / str(i), pair.model, optimizer)
            pair.taken = extra["taken"]
        return pair

    def fn(rank: int) -> None:
        pair = Pair(rank, **options).step(4)
        for i, optimizer in enumerate(pair.optimizers):
            hvd_saef.save_checkpoint(tmp_path / str(i), pair.model, optimizer, taken=pair.taken)
        expected = pair.step(4).everything()
        assert load(Pair(rank, seed=1, **options)).step(4).everything() == expected
        assert load(pair).step(4).everything() == expected

    together(workers, fn)


def test_one_folder_for_both_is_refused(tmp_path: Path) -> None:
    def fn(rank: int) -> None:
        pair = Pair(rank).step(2)
        hvd_saef.save_checkpoint(tmp_path, pair.model, pair.optimizers[0], whose="matrices")
        with pytest.raises(hvd_saef.CheckpointError, match="another optimizer"):
            hvd_saef.save_checkpoint(tmp_path, pair.model, pair.optimizers[1], whose="vectors")
        assert hvd_saef.load_checkpoint(tmp_path, pair.model, pair.optimizers[0]) == {"whose": "matrices"}

    together(2, fn)
