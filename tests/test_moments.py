"""Second moments from the mean gradient: with p = 1 and no compression, Adam on the mean gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from tests.workers import NO_MODEL, Run, adamw, everything, saved, sgd, together, warned

pytestmark = pytest.mark.filterwarnings(NO_MODEL)
WORKERS = 3
LOCAL: dict[str, Any] = {"feedback": "ef", "compression": hvd_saef.Compression.none}
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def gradient(rank: int, step: int, noise: float) -> Tensor:
    """The same sign on all workers, so that none is more than WORKERS times the mean's size."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    common = 1 + torch.arange(12, dtype=torch.float64) / 3 + step % 3
    return common * (1 + noise * torch.rand(12, dtype=torch.float64, generator=generator))


def run_plain(make: Make, steps: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x, v and m of worker 0 after steps by gradients that do not depend on x."""

    def work(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        x = nn.Parameter(torch.zeros(12, dtype=torch.float64))
        optimizer = hvd_saef.DistributedOptimizer(make([x]), **options)
        for step in range(steps):
            x.grad = gradient(rank, step, 0.5)
            optimizer.step()
        optimizer.eval()
        state = optimizer.state[x]
        return x.detach().clone(), state["exp_avg_sq"].clone(), state["exp_avg"].clone()

    everyone = together(WORKERS, work)
    assert all(torch.equal(x, everyone[0][0]) for x, _, _ in everyone)
    return everyone[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.95), weight_decay=0.0),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0, foreach=True),
        lambda p: torch.optim.NAdam(p, lr=0.1),
        lambda p: torch.optim.RAdam(p, lr=0.1),
    ],
    ids=["AdamW", "Adam", "foreach", "NAdam", "RAdam"],
)
def test_adam_on_the_mean_gradient(make: Make) -> None:
    """From the second step on: at the first there is no state to prepare, so it divides by its own v."""
    everywhere: dict[str, Any] = {"feedback": "none", "compression": hvd_saef.Compression.none}
    first, first_v, _ = run_plain(make, 1, second_moment_period=1, **LOCAL)
    mean_first, mean_first_v, _ = run_plain(make, 1, **everywhere)
    torch.testing.assert_close(first_v, mean_first_v)
    for steps in (2, 9):
        ours, v, _ = run_plain(make, steps, second_moment_period=1, **LOCAL)
        mean, mean_v, _ = run_plain(make, steps, **everywhere)
        _, own_v, _ = run_plain(make, steps, **LOCAL)
        torch.testing.assert_close(v, mean_v)
        torch.testing.assert_close(ours - first, mean - mean_first, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(own_v, mean_v, rtol=1e-3)  # without it, they are not


@pytest.mark.parametrize("options", [{}, {"local_steps": 2}, {"server_step_ahead": 1.0}], ids=str)
def test_kept_and_the_same_everywhere(options: dict[str, Any]) -> None:
    """V changes in the first p rounds and every p-th, and nowhere else."""
    period, steps = 3, options.get("local_steps", 1)

    def work(rank: int) -> list[list[Tensor]]:
        run = Run(rank, make=adamw, second_moment_period=period, **options)
        history = []
        for _ in range(10 * steps):
            run.step()
            history.append(
                [run.optimizer.state[p]["exp_avg_sq"].clone() for p in run.parameters if p.numel() > 3]
            )
        return history

    everyone = together(WORKERS, work)
    for after in zip(*everyone, strict=True):
        assert all(torch.equal(a, b) for other in after for a, b in zip(other, after[0], strict=True))
    changes = [
        step
        for step in range(1, 10 * steps)
        if not all(map(torch.equal, everyone[0][step], everyone[0][step - 1]))
    ]
    assert changes == [steps * rounds for rounds in (1, 2, 3, 6, 9)]


def test_what_is_rare_is_not_divided_by_nothing() -> None:
    """An element with no gradient whenever v takes one in moves at most as Adam's own would, times √K."""

    def work(rank: int) -> Tensor:
        x = nn.Parameter(torch.zeros(8))
        inner = torch.optim.AdamW([x], lr=0.1, weight_decay=0.0)
        optimizer = hvd_saef.DistributedOptimizer(inner, second_moment_period=4, **LOCAL)
        for step in range(7):
            x.grad = torch.ones(8)
            x.grad[3:] = 10.0 if step == 6 else 0.0
            optimizer.step()
        return x.detach().clone()

    x = together(WORKERS, work)[0]
    alone = 0.1 * (0.1 / (1 - 0.9**7)) / ((0.001 / (1 - 0.999**7)) ** 0.5)  # Adam's, for one gradient
    assert x.isfinite().all()
    assert -x[3:].max() == pytest.approx(alone * WORKERS**0.5, rel=1e-3)


def test_bytes_are_counted() -> None:
    def sent(rank: int, period: int | None) -> float:
        run = Run(rank, make=adamw, second_moment_period=period).step(12)
        return float(run.optimizer.stats()["averaging_bytes_sent"])

    assert together(2, lambda rank: sent(rank, None)) == [0, 0]
    elements = 35 + 3 + 1 + 24
    assert together(2, lambda rank: sent(rank, 4)) == 2 * [4 * elements * (4 + 2)]  # rounds 0-3, 4 and 8


def test_resumed_to_the_bit() -> None:
    def work(rank: int) -> bool:
        options: dict[str, Any] = {"make": adamw, "second_moment_period": 3}
        run = Run(rank, **options).step(7)
        states = saved({"parameters": run.parameters, "state": run.optimizer.state_dict()})
        other = Run(rank, **options)
        other.optimizer.load_state_dict(states["state"])
        other.taken = run.taken
        return everything(run.step(5)) == everything(other.step(5))

    assert all(together(WORKERS, work))


def test_refusals() -> None:
    def work(rank: int) -> None:
        with pytest.raises(ValueError, match="SGD has no second moments"):
            Run(rank, make=sgd, second_moment_period=4)
        everywhere: dict[str, Any] = {"feedback": "none", "compression": hvd_saef.Compression.none}
        with pytest.raises(ValueError, match="all gradients are means"):
            Run(rank, make=adamw, second_moment_period=4, **everywhere)
        with pytest.raises(ValueError, match="use one of the two"):
            Run(rank, make=adamw, second_moment_period=4, overlap=True)
        with pytest.raises(ValueError, match=r"second_moment_period=0: a whole number >= 1 or None"):
            Run(rank, make=adamw, second_moment_period=0)

    together(2, work)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (adamw, {}, "AdamW divides each of the 3 workers' updates"),
        (adamw, {}, "pass second_moment_period=16"),
        (adamw, {}, "√K = 1.7 times smaller"),
        (lambda p: torch.optim.RMSprop(p), {}, "the learning rate, up to √K"),
        (sgd, {}, None),
        (adamw, {"second_moment_period": 2}, None),
        (adamw, {"feedback": "none", "compression": hvd_saef.Compression.none}, None),
    ],
)
def test_hint(make: Make, options: dict[str, Any], said: str | None) -> None:
    """On rank 0 alone, where an adaptive optimizer takes its steps on local gradients."""
    told = [(rank, text) for rank, text in warned(3, lambda r: Run(r, make, **options)) if "divides" in text]
    assert [rank for rank, _ in told] == ([0] if said else [])
    assert not said or said in told[0][1]
    assert "second_moment" not in "".join(text for _, text in told) or make is adamw


def test_no_hint_for_one_worker() -> None:
    assert not [text for _, text in warned(1, lambda rank: Run(rank, adamw)) if "divides" in text]
