"""Times whole steps of small models on these ranks: what they add, and what backward hides. Collective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hvd_saef.optimizer import DistributedOptimizer
from hvd_saef.planning.constants import Constants
from hvd_saef.planning.plan import BACKWARD, METHODS, Job, Method, seconds
from hvd_saef.planning.timing import Clock

METHOD: Method = next(method for method in METHODS if method.name == "sign DC")
"""The method whose steps are timed."""
SMALL = (64, 1)
"""The width and the number of layers of a model that has hardly anything to send."""
LARGE = {"cpu": (512, 16), "cuda": (2048, 8)}
"""The same of a model with some 4 M parameters, on a GPU some 34 M."""
FEWEST_ROWS, MOST_ROWS = 16, 1 << 14
"""The batch: as many rows as make a step of LONG seconds, between these."""
LONG = 0.2


@dataclass(frozen=True)
class Steps:
    """What whole steps of METHOD took."""

    fixed: float
    """The seconds that a step adds beside its encoding, its messages and its bytes."""
    hidden: float
    """The share of the exchange that ran behind backward, of what could."""
    job: Job
    """The larger model's job; its `compute` is the step without an exchange."""
    taken: float
    """The seconds of a step of that job, without overlap."""


def measure_steps(clock: Clock, known: Constants, ranks: int, begin: Callable[[str], None]) -> Steps:
    """Returns what steps cost. Collective.

    `known` are the constants so far, "fixed" and `hidden` among them left out of account; `ranks` are those
    of a node, and `begin` is told what is measured.
    """
    begin("a step that sends hardly anything")
    small = _Training(clock, *SMALL, FEWEST_ROWS)
    job = _job(clock, small, ranks, known)
    added = small.step(overlap=False) - job.compute
    others = {name: units for name, units in METHOD.features(job).items() if name != "fixed"}
    fixed = max(0.0, added - seconds(others, known))
    begin("a step without an exchange")
    shape = LARGE.get(clock.device.type, LARGE["cpu"])
    few = _Training(clock, *shape, FEWEST_ROWS).step()
    wanted = min(LONG, clock.seconds) / few
    large = _Training(clock, *shape, min(MOST_ROWS, max(FEWEST_ROWS, int(FEWEST_ROWS * wanted))))
    job = _job(clock, large, ranks, known)
    begin("a step")
    plain = large.step(overlap=False)
    begin("a step with overlap=True")
    behind = large.step(overlap=True)
    could = min(max(0.0, plain - job.compute), BACKWARD * job.compute)
    hidden = min(1.0, max(0.0, plain - behind) / could) if could else 0.0
    return Steps(fixed, hidden, job, plain)


def _job(clock: Clock, training: _Training, ranks: int, known: Constants) -> Job:
    """Returns the job of `training` on these ranks; times its step without an exchange. Collective."""
    rate = float("inf") if known.bandwidth is None else known.bandwidth
    workers, compute = clock.communicator.size, training.step()
    return Job(training.sizes, workers, rate, compute, ranks)


class _Training:
    """A stack of equal layers, whose step can be timed."""

    def __init__(self, clock: Clock, width: int, layers: int, rows: int) -> None:
        self._clock = clock
        generator = torch.Generator().manual_seed(0)  # the same parameters on all ranks
        self._model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.copy_(torch.randn(width, width, generator=generator) / width**0.5)
        self._model.to(clock.device)
        self._batch = torch.randn(rows, width, generator=generator).to(clock.device)
        self.sizes = tuple(parameter.numel() for parameter in self._model.parameters())

    def step(self, overlap: bool | None = None) -> float:
        """Returns the seconds of a step: without exchange (None), or without or with overlap. Collective."""
        optimizer: Any = torch.optim.SGD(self._model.parameters(), lr=1e-6, momentum=0.9)
        if overlap is not None:
            share = max(
                1, sum(self.sizes) // self._clock.communicator.size
            )  # or the largest block is too large
            optimizer = DistributedOptimizer(
                optimizer,
                self._model.named_parameters(),
                model=self._model,
                block_size=min(share, max(self.sizes)),
                overlap=overlap,
            )

        def call() -> None:
            optimizer.zero_grad()
            self._model(self._batch).square().mean().backward()
            optimizer.step()

        return self._clock.time(call)
