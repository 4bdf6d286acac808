"""Rounds of the library, seen from outside: by the parameters before and after, and by state dicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd_saef import run_workers
from tests.oracle import Array, Gradient, Setup, mean
from tests.problems import Outcome, curved_valley, outcome, run_library, start_point


@dataclass(frozen=True)
class Round:
    """What one round did. Lists of arrays are one array a parameter, lists of those one list a worker."""

    b: list[list[Array]]
    y: list[list[Array]]
    after: list[Outcome]
    """Of each worker, when step() has returned."""

    @property
    def mean_update(self) -> list[Array]:
        """The mean over workers of b - y."""
        differences = [
            [b - y for b, y in zip(bs, ys, strict=True)] for bs, ys in zip(self.b, self.y, strict=True)
        ]
        return [mean(list(of_workers)) for of_workers in zip(*differences, strict=True)]

    @property
    def server_error(self) -> list[Array]:
        """s, from the pieces that the workers hold."""
        whole = [np.zeros_like(x) for x in self.after[0].x]
        for held in self.after:
            for name, (start, values) in held.server_error.items():
                place = whole[int(name.split(".")[-1])].reshape(-1)
                place[start : start + values.size] = values
        return whole

    @property
    def auxiliary(self) -> list[Array]:
        """The auxiliary point: x - (s + mean e)."""
        errors = [mean(list(of_workers)) for of_workers in zip(*(o.errors for o in self.after), strict=True)]
        return [x - (s + e) for x, s, e in zip(self.after[0].x, self.server_error, errors, strict=True)]


def watch(
    setup: Setup,
    rounds: int = 8,
    start: list[Array] | None = None,
    gradient: Gradient = curved_valley,
    **options: Any,
) -> list[Round]:
    """The rounds of a run of `setup`, which must say plain SGD: so that y is known without the library."""
    if setup.optimizer != "sgd" or setup.weight_decay:
        raise ValueError("plain SGD is needed")
    start = start_point() if start is None else start

    def work(rank: int) -> list[tuple[list[Array], list[Array], Outcome]]:
        begins: list[list[Array]] = []
        ends: list[list[Array]] = []
        outcomes: list[Outcome] = []

        def observed(worker: int, step: int, parameters: list[Array]) -> list[Array | None]:
            slopes = gradient(worker, step, parameters)
            if step % setup.local_steps == 0:
                begins.append(parameters)
            if (step + 1) % setup.local_steps == 0:
                lr = setup.lr(step)
                ends.append([p if g is None else p - lr * g for p, g in zip(parameters, slopes, strict=True)])
            return slopes

        def each_step(step: int, optimizer: Any) -> None:
            if (step + 1) % setup.local_steps == 0:
                outcomes.append(outcome(optimizer, optimizer.param_groups[0]["params"]))

        steps = rounds * setup.local_steps
        run_library(setup, rank, start, observed, steps, each_step=each_step, **options)
        return list(zip(begins, ends, outcomes, strict=True))

    of_workers = run_workers(setup.workers, work)
    return [
        Round([b for b, _, _ in seen], [y for _, y, _ in seen], [after for _, _, after in seen])
        for seen in zip(*of_workers, strict=True)
    ]


def moves(start: list[Array], rounds: list[Round]) -> list[tuple[list[Array], list[Array]]]:
    """Of each round, where x~ went and where mean(b - y) says that it should."""
    points = [start, *(r.auxiliary for r in rounds)]
    return [
        (after, [p - u for p, u in zip(before, r.mean_update, strict=True)])
        for before, after, r in zip(points, points[1:], rounds, strict=False)
    ]
