"""What the wrapped optimizer shares with the given one, its step, and the methods between steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_saef import Compression
from tests.workers import NO_MODEL, Run, adamw, bits, everything, sgd, together

pytestmark = pytest.mark.filterwarnings(NO_MODEL)

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
DENSE: dict[str, Any] = {"compression": Compression.none, "feedback": "none"}
SETTINGS: dict[str, dict[str, Any]] = {
    "sharded": {},
    "replicated": {"server": "replicated", "server_step_ahead": 0.5},
    "single-way": {"double_compression": False, "compression": Compression.topk(0.2)},
    "ef, three local steps": {"feedback": "ef", "local_steps": 3},
}


@pytest.mark.parametrize("make", [sgd, adamw])
def test_it_is_the_given_optimizer(make: Make) -> None:
    kinds = {"momentum_buffer"} if make is sgd else {"step", "exp_avg", "exp_avg_sq"}

    def fn(rank: int) -> None:
        run = Run(rank, make)
        assert isinstance(run.optimizer, type(run.inner))
        assert type(run.optimizer).__name__ == type(run.inner).__name__
        assert run.optimizer.param_groups[0] is run.inner.param_groups[0]
        run.step(2)
        assert run.optimizer.state is run.inner.state
        assert set(run.optimizer.state_dict()) == {"state", "param_groups", "hvd_saef"}
        assert all(set(state) == kinds for state in run.optimizer.state_dict()["state"].values())
        assert set(run.optimizer.state) <= set(run.parameters)
        run.optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in run.parameters)

    together(2, fn)


@pytest.mark.parametrize("wrapped", [False, True], ids=["made before wrapping", "made after"])
@pytest.mark.parametrize("load", [False, True], ids=["", "loading"])
def test_schedulers(wrapped: bool, load: bool) -> None:
    def fn(rank: int) -> tuple[list[float], dict[str, bytes]]:
        run, rates = Run(rank), []
        given = run.optimizer if wrapped else run.inner
        scheduler = torch.optim.lr_scheduler.LambdaLR(given, lambda epoch: 0.5**epoch)
        for _ in range(3):
            if load:
                run.optimizer.load_state_dict(run.optimizer.state_dict())
            rates.append(run.optimizer.param_groups[0]["lr"])
            run.step()
            scheduler.step()
        return rates, bits(run.x())

    def by_hand(rank: int) -> dict[str, bytes]:
        run = Run(rank)
        for rate in (0.05, 0.025, 0.0125):
            run.optimizer.param_groups[0]["lr"] = rate
            run.step()
        return bits(run.x())

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        rates, xs = zip(*together(2, fn), strict=True)
    assert rates == ([0.05, 0.025, 0.0125],) * 2
    assert list(xs) == together(2, by_hand)


@pytest.mark.parametrize("wrapped", [False, True], ids=["made before wrapping", "made after"])
def test_a_scheduler_does_not_miss_the_steps(wrapped: bool) -> None:
    def fn(rank: int) -> None:
        run = Run(rank)
        scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer if wrapped else run.inner, 1)
        run.step()
        scheduler.step()

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        together(1, fn)
    assert not [str(warning.message) for warning in seen if "lr_scheduler" in str(warning.message)]


def test_step_hooks_fire_once() -> None:
    def fn(rank: int) -> None:
        counts = dict.fromkeys(("pre before", "post before", "pre after", "post after"), 0)

        def counter(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                counts[name] += 1

            return hook

        def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            optimizer = sgd(parameters)
            optimizer.register_step_pre_hook(counter("pre before"))
            optimizer.register_step_post_hook(counter("post before"))
            return optimizer

        run = Run(rank, make)
        run.optimizer.register_step_pre_hook(counter("pre after"))
        run.optimizer.register_step_post_hook(counter("post after"))
        for number in (1, 2, 3, 4):
            run.step()
            assert set(counts.values()) == {number}, counts
            if number == 2:
                run.optimizer.load_state_dict(run.optimizer.state_dict())

    together(2, fn)


@pytest.mark.parametrize("options", [{}, DENSE, {"local_steps": 2}], ids=str)
def test_closure(options: dict[str, Any]) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        run, at = Run(rank, **options), []

        def closure() -> float:
            assert torch.is_grad_enabled()
            at.append(bits(run.parameters))
            run.set_gradients()
            return 7.0 + run.taken

        for step in range(5):
            here = bits(run.parameters)
            with torch.no_grad():
                assert run.optimizer.step(closure) == 7.0 + step
            assert at.pop() == here
            assert not at
            run.taken += 1
        return everything(run)

    assert together(2, fn) == together(2, lambda rank: everything(Run(rank, **options).step(5)))


def auxiliary(run: Run) -> list[Tensor]:
    """One worker's share x - s - e of the auxiliary point, which is the workers' mean of it."""
    ours = run.optimizer.state_dict()["hvd_saef"]
    s = {name: piece["values"].view(ours["x"][name].shape) for name, piece in ours["server_errors"].items()}
    return [x - s[name] - ours["errors"][name] for name, x in ours["x"].items()]


@pytest.mark.parametrize("steps", [1, 2])
def test_flush_completes_the_round(steps: int) -> None:
    def fn(rank: int) -> tuple[list[Tensor], dict[str, bytes]]:
        run = Run(rank, server="replicated", dtype=torch.float64, local_steps=3).step(3)
        before, sent = everything(run), run.optimizer.stats()["payload_bytes_sent"]
        run.optimizer.flush()  # at the round's start
        assert everything(run) == before
        assert run.optimizer.stats()["payload_bytes_sent"] == sent
        old, b = auxiliary(run), [parameter.detach().clone() for parameter in run.parameters]
        run.step(steps)
        y = [parameter.detach().clone() for parameter in run.parameters]
        run.optimizer.eval()
        run.optimizer.flush()
        assert run.optimizer.stats()["rounds"] == 2
        assert run.ours("local_steps_done") == 0
        assert bits(run.parameters) == bits(run.x())
        moved = [o - n - (b - y) for o, n, b, y in zip(old, auxiliary(run), b, y, strict=True)]
        return moved, bits(run.x())

    results = together(2, fn)
    assert results[0][1] == results[1][1]
    for left, right in zip(results[0][0], results[1][0], strict=True):  # the point moves by mean(b - y)
        assert float((left + right).abs().max()) < 1e-12


def test_what_the_parameters_dtype_rounds_away_is_no_update() -> None:
    def fn(rank: int) -> None:
        run = Run(rank, dtype=torch.bfloat16, feedback="ef").step(3)
        before = auxiliary(run)
        run.optimizer.param_groups[0]["lr"] = 0.0
        run.step(5)
        for old, new in zip(before, auxiliary(run), strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=1e-5)

    together(1, fn)


def server_errors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The server's error of a state dict by parameter, NaN where it is not held."""
    found = {name: torch.full_like(x, torch.nan).flatten() for name, x in state["hvd_saef"]["x"].items()}
    for name, piece in state["hvd_saef"]["server_errors"].items():
        found[name][piece["start"] : piece["start"] + piece["values"].numel()] = piece["values"]
    return found


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("make", [sgd, adamw])
def test_consolidate(options: dict[str, Any], make: Make) -> None:
    def fn(rank: int) -> tuple[list[dict[str, Tensor]], dict[str, bytes]]:
        run = Run(rank, make, dtype=torch.float64, **options).step(6)
        averaged: list[dict[str, Tensor]] = []
        kept = []
        for act in (lambda: None, run.optimizer.consolidate):
            act()
            state = run.optimizer.state_dict()
            moments = {
                f"{i}.{kind}": moment
                for i, moments in state["state"].items()
                for kind, moment in moments.items()
                if kind != "step"
            }
            averaged.append({name: t.clone() for name, t in (state["hvd_saef"]["errors"] | moments).items()})
            kept.append((bits([state["hvd_saef"][key] for key in ("x", "rounds")]), server_errors(state)))
        assert kept[0][0] == kept[1][0]
        for name, values in kept[0][1].items():  # all of s is there afterwards, the part as before in it
            assert bits(kept[1][1][name][~values.isnan()]) == bits(values[~values.isnan()])
        return averaged, bits(run.parameters)

    results = together(3, fn)
    befores, afters = zip(*(averaged for averaged, _ in results), strict=True)
    assert bits(befores[0]) != bits(befores[1])
    assert bits(afters[0]) == bits(afters[1]) == bits(afters[2])
    for name, after in afters[0].items():
        mean = torch.stack([before[name] for before in befores]).mean(0)
        torch.testing.assert_close(after, mean, rtol=0, atol=1e-14)
    assert results[0][1] == results[1][1] == results[2][1]  # α·e is the same everywhere now


def test_consolidate_completes_a_round_and_leaves_step_counts() -> None:
    def fn(rank: int) -> None:
        run = Run(rank, adamw, local_steps=3).step(4)
        run.set_gradients()
        if rank == 1:
            run.parameters[2].grad = None  # the parameter without dimensions, as Adam's step counts are
        run.optimizer.step()
        run.optimizer.consolidate()
        assert run.optimizer.stats()["rounds"] == 2
        assert run.optimizer.state[run.parameters[2]]["step"].item() == (4 if rank == 1 else 5)

    together(2, fn)


@pytest.mark.parametrize("options", [*SETTINGS.values(), DENSE], ids=str)
@pytest.mark.parametrize("evaluating", [False, True])
def test_reanchor(options: dict[str, Any], evaluating: bool) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        run = Run(rank, **options).step(4)
        rounds = run.optimizer.stats()["rounds"]
        if evaluating:
            run.optimizer.eval()
        with torch.no_grad():
            for parameter in run.parameters:
                parameter.copy_(torch.full_like(parameter, 0.5 + rank))
        run.optimizer.reanchor()
        run.optimizer.train()
        for parameter in run.parameters:
            assert bits(parameter) == bits(torch.full_like(parameter, 0.5))
        assert run.optimizer.stats()["error_norm"] == 0
        assert run.optimizer.stats()["server_error_norm"] == 0
        assert run.optimizer.stats()["rounds"] == rounds
        if options is not DENSE:
            assert bits(run.x()) == bits([torch.full_like(x, 0.5) for x in run.x()])
        run.step(3)
        run.optimizer.eval()
        return bits(run.parameters)

    first, *others = together(3, fn)
    assert all(other == first for other in others)
