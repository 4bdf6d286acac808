"""Workers of several ranks for tests: what the oracle is to see of them."""

from __future__ import annotations

from collections.abc import Sequence

from tests.oracle import Array, Gradient, mean


def of_nodes(gradient: Gradient, counts: Sequence[int]) -> Gradient:
    """The gradients of workers whose counts[k] ranks average theirs; missing ones count as zero, not all."""

    def averaged(worker: int, step: int, parameters: list[Array]) -> list[Array | None]:
        first = sum(counts[:worker])
        everyone = [gradient(first + place, step, parameters) for place in range(counts[worker])]
        means: list[Array | None] = []
        for slopes in zip(*everyone, strict=True):
            there = [slope for slope in slopes if slope is not None]
            missing = [0 * there[0]] * (len(slopes) - len(there)) if there else []
            means.append(mean([*there, *missing]) if there else None)
        return means

    return averaged
