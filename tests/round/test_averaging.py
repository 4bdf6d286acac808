"""Row 1 in other ways: buckets one after the other, and in float16."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.workers import NO_MODEL, Run, together

pytestmark = [pytest.mark.both_arithmetics, pytest.mark.filterwarnings(NO_MODEL)]
SMALL = 64  # bytes of a bucket: several buckets
PERIOD = 4


def errors(run: Run) -> list[Tensor]:
    """This worker's e, a tensor a parameter of several elements: one alone has no error with signs."""
    return [value.clone() for value in run.ours("errors").values() if value.numel() > 1]


def equal_everywhere(everyone: list[list[Tensor]]) -> list[bool]:
    """For each parameter, whether all workers have the same error."""
    return [
        all(torch.equal(others[0], other) for other in others[1:]) for others in zip(*everyone, strict=True)
    ]


def history(rounds: int, **options: Any) -> list[list[list[Tensor]]]:
    """Errors after each round, by round and worker."""

    def work(rank: int) -> list[list[Tensor]]:
        run = Run(rank, averaging_period=PERIOD, **options)
        return [errors(run.step()) for _ in range(rounds)]

    return [list(after) for after in zip(*together(3, work), strict=True)]


def test_spread() -> None:
    """Each bucket is averaged every p rounds, and no round averages all of them."""
    after = history(3 * PERIOD, bucket_bytes=SMALL, averaging_spread=True)
    averaged = [equal_everywhere(workers) for workers in after]
    for parameter in range(len(averaged[0])):
        turns = [number for number, which in enumerate(averaged) if which[parameter]]
        assert len(turns) == 3
        assert [b - a for a, b in itertools.pairwise(turns)] == [PERIOD, PERIOD]
    assert not any(all(which) for which in averaged)
    together_at = [equal_everywhere(workers) for workers in history(3 * PERIOD, bucket_bytes=SMALL)]
    assert sum(all(which) for which in together_at) == 3  # without it they are


def test_one_bucket_has_nothing_to_spread() -> None:
    """The same bits, then."""
    plain, spread = history(9), history(9, averaging_spread=True)
    assert all(
        torch.equal(a, b)
        for some, others in zip(plain, spread, strict=True)
        for mine, theirs in zip(some, others, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )


def test_spread_costs_the_same() -> None:
    """As many bytes in p rounds."""

    def sent(rank: int, **options: Any) -> float:
        run = Run(rank, averaging_period=PERIOD, bucket_bytes=SMALL, **options).step(2 * PERIOD)
        return float(run.optimizer.stats()["averaging_bytes_sent"])

    plain = together(3, sent)
    assert together(3, lambda rank: sent(rank, averaging_spread=True)) == plain
    assert plain[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float16(dtype: torch.dtype) -> None:
    """The mean error is kept to the sum's rounding; workers' errors differ by what theirs rounded away."""

    def work(rank: int) -> tuple[list[Tensor], list[Tensor], float, float]:
        options: dict[str, Any] = {"averaging_period": PERIOD, "dtype": dtype}
        exact = Run(rank, **options).step(PERIOD - 1)
        half = Run(rank, averaging_fp16=True, **options).step(PERIOD - 1)
        sizes = [run.optimizer.stats()["averaging_bytes_sent"] for run in (exact, half)]
        return errors(exact), errors(half), *sizes

    everyone = together(3, work)
    for exact, half, whole_bytes, half_bytes in everyone:
        assert half_bytes * dtype.itemsize == whole_bytes * 2
        for a, b in zip(exact, half, strict=True):
            assert torch.allclose(a, b, rtol=2e-3, atol=1e-4)
            assert not torch.equal(a, b)
    for parameter in range(len(everyone[0][0])):
        exactly = torch.stack([worker[0][parameter].double() for worker in everyone]).mean(0)
        halved = torch.stack([worker[1][parameter].double() for worker in everyone]).mean(0)
        assert torch.allclose(exactly, halved, rtol=1e-3, atol=1e-5)
    assert not all(equal_everywhere([half for _, half, _, _ in everyone]))


def test_float16_is_finite_beyond_its_range() -> None:
    """An error that float16 cannot hold stays an error."""

    def work(rank: int) -> list[Tensor]:
        run = Run(rank, averaging_period=2, averaging_fp16=True)
        run.set_gradients()
        for parameter in run.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1e9)
        run.optimizer.step()
        return errors(run)

    everyone = together(2, work)
    assert all(torch.isfinite(error).all() for worker in everyone for error in worker)
    assert max(float(error.abs().max()) for worker in everyone for error in worker) > 65504


def test_consolidation_is_exact() -> None:
    """Also where the averagings are not: it is what saving on one rank relies on."""

    def work(rank: int) -> list[Tensor]:
        run = Run(rank, averaging_period=PERIOD, averaging_fp16=True).step(PERIOD + 1)
        run.optimizer.consolidate()
        return errors(run)

    assert all(equal_everywhere(together(3, work)))
