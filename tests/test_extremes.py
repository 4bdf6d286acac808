"""Models of uncommon shapes, and wrappers made and dropped: nothing hangs, grows or parts."""

from __future__ import annotations

import gc
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hvd_saef
from tests.workers import NO_MODEL, bits, sgd, together

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
]

MODELS: dict[str, list[tuple[int, ...]]] = {
    "5,000 parameters": [(3, 2)] * 5000,
    "scalars only": [()] * 40,
    "one scalar": [()],
    "a large one": [(2_000_000,)],
    "an empty one": [(0,), (3,), (0, 4)],
}


@pytest.mark.parametrize("options", [{}, {"compression": hvd_saef.Compression.topk(0.01)}], ids=str)
@pytest.mark.parametrize("shapes", MODELS.values(), ids=MODELS)
def test_uncommon_models(shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    """X has the same bits on both, and moves. One tensor of 300 M: `python -m tests.test_extremes`."""

    def fn(rank: int) -> dict[str, bytes]:
        parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = hvd_saef.DistributedOptimizer(sgd(parameters), averaging_period=2, **options)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        optimizer.eval()
        return bits([parameter.detach() for parameter in parameters])

    one, other = together(2, fn)
    assert one == other
    assert one != bits([torch.ones(shape) for shape in shapes])


def test_wrappers_that_are_dropped_leave_nothing() -> None:
    """200 of them (1,000 in tests.mpi.soak): objects, descriptors and threads stay as many as they were."""

    def standing() -> tuple[int, int, int]:
        gc.collect()
        wrappers = sum(type(thing).__name__ == "Session" for thing in gc.get_objects())
        return wrappers, len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    def fn(rank: int) -> None:
        model = nn.Linear(20, 10)
        before = standing() if rank == 0 else None
        for number in range(200):
            optimizer = hvd_saef.DistributedOptimizer(
                sgd(list(model.parameters())), model.named_parameters(), model=model
            )
            model(torch.ones(2, 20)).sum().backward()
            optimizer.step()
            optimizer.eval()
            del optimizer
            if number == 0:
                before = standing() if rank == 0 else None
        if rank == 0:
            assert before is not None
            after = standing()
            assert after[0] <= before[0] + 2
            assert after[1:] == before[1:]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together(1, fn)


def main(elements: int = 300_000_000) -> None:
    """One worker, one tensor of so many elements, two steps; prints the memory it took."""
    import resource

    torch.set_num_threads(os.cpu_count() or 1)
    parameter = nn.Parameter(torch.zeros(elements))

    def fn(rank: int) -> None:
        wrapped = hvd_saef.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1))
        for step in range(2):
            parameter.grad = torch.full_like(parameter, 1.0 + step)
            wrapped.step()
        wrapped.eval()

    hvd_saef.run_workers(1, fn)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    same = torch.allclose(parameter.detach(), torch.tensor(-0.3))
    print(f"{elements} elements: right: {same}; peak {peak / elements:.1f} bytes an element")


if __name__ == "__main__":
    main()
