"""What happens to gradients: Horovod's recipes, a loss scaler's, and NaNs and infinities."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_saef import Compression, NonFiniteUpdateError
from tests.older_torch import needs_optimizer
from tests.problems import curved_valley, start_point
from tests.workers import NO_MODEL, Run, adamw, bits, everything, sgd, together, warned

pytestmark = pytest.mark.filterwarnings(NO_MODEL)

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
DENSE: dict[str, Any] = {"compression": Compression.none, "feedback": "none"}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_without_feedback_and_compression_gradients_are_averaged(clip: bool, make: Make) -> None:
    def ours(rank: int) -> list[Tensor]:
        run = Run(rank, make, dtype=torch.float64, **DENSE)
        for _ in range(10):
            run.set_gradients()
            if clip and run.taken % 2:
                run.optimizer.synchronize()
                nn.utils.clip_grad_norm_(run.parameters, 0.5)
                with run.optimizer.skip_synchronize():
                    run.optimizer.step()
            else:
                run.optimizer.step()
            run.taken += 1
        found = run.optimizer.stats()
        assert found["dense_bytes_sent"] == 2 * found["ring_allreduce_bytes"] == 10 * (2 * 2 * 63 * 8 // 3)
        return [parameter.detach() for parameter in run.parameters]

    parameters = [nn.Parameter(torch.tensor(array)) for array in start_point()]
    optimizer = make(parameters)
    for step in range(10):
        at = [parameter.detach().numpy().copy() for parameter in parameters]
        slopes = [curved_valley(rank, step, at) for rank in range(3)]
        for i, parameter in enumerate(parameters):
            found = [np.zeros_like(at[i]) if slope[i] is None else slope[i] for slope in slopes]
            parameter.grad = torch.tensor(np.mean(np.array(found), axis=0))
        if clip and step % 2:
            nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    for result in together(3, ours):
        for mine, theirs in zip(result, parameters, strict=True):
            torch.testing.assert_close(mine, theirs.detach(), rtol=0, atol=1e-12)


def test_with_compression_the_clipping_recipe_sees_local_gradients() -> None:
    def fn(rank: int, recipe: bool) -> dict[str, bytes]:
        run = Run(rank)
        for _ in range(5):
            run.set_gradients()
            if recipe:
                local = bits([parameter.grad for parameter in run.parameters])
                run.optimizer.synchronize()
                assert bits([parameter.grad for parameter in run.parameters]) == local
            nn.utils.clip_grad_norm_(run.parameters, 0.5)
            if recipe:
                with run.optimizer.skip_synchronize():
                    run.optimizer.step()
            else:
                run.optimizer.step()
            run.taken += 1
        return everything(run)

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


def fused(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer that would unscale gradients by itself."""
    return torch.optim.AdamW(parameters, lr=0.02, fused=True)


@pytest.mark.parametrize("options", [{}, {"feedback": "ef", "local_steps": 2}, DENSE], ids=str)
@pytest.mark.parametrize(
    "make", [sgd, adamw, pytest.param(fused, marks=needs_optimizer("AdamW", fused=True))]
)
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled by the user"])
def test_grad_scaler(options: dict[str, Any], make: Make, unscale: bool) -> None:
    """Scales are powers of two, so that runs with and without a scaler agree to the bit."""
    overflow = 3

    def scaled(rank: int) -> dict[str, bytes]:
        run, scaler = Run(rank, make, **options), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(6):
            run.set_gradients()
            slopes = [parameter.grad for parameter in run.parameters]
            run.optimizer.zero_grad()
            pairs = zip(run.parameters, slopes, strict=True)
            loss = torch.stack([(p * g).sum() for p, g in pairs if g is not None]).sum()
            if step == overflow and rank == 1:
                loss = loss * math.inf
            torch.autograd.backward(scaler.scale(loss))
            if unscale:
                scaler.unscale_(run.optimizer)
            before = everything(run)
            scaler.step(run.optimizer)
            scaler.update()
            if step == overflow:
                changed = {key for key, value in everything(run).items() if before[key] != value}
                assert changed == set()
            run.taken += 1
        assert run.optimizer.stats()["skipped"] == 1
        assert scaler.get_scale() == (512.0 if rank == 1 else 1024.0)
        return bits([run.parameters, run.optimizer.state_dict()["state"]])

    def plain(rank: int) -> dict[str, bytes]:
        run = Run(rank, make, **options)
        for step in range(6):
            if step == overflow:
                run.taken += 1
            else:
                run.step()
        return bits([run.parameters, run.optimizer.state_dict()["state"]])

    with_scaler, without = together(3, scaled), together(3, plain)
    assert with_scaler == without


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"local_steps": 3}, {"server": "replicated", "averaging_period": 2}, DENSE], ids=str
)
@pytest.mark.parametrize("steps", [0, 4])
def test_a_nonfinite_gradient_raises_on_all(value: float, options: dict[str, Any], steps: int) -> None:
    def fn(rank: int, stumble: bool) -> dict[str, bytes]:
        run = Run(rank, **options).step(steps)
        if stumble:
            run.set_gradients()
            if rank == 1:
                gradient = run.parameters[3].grad
                assert gradient is not None
                gradient[0, 1, 2] = value
            before = bits([run.parameters, run.optimizer.state_dict()["state"]]) | stable(run, steps)
            with pytest.raises(NonFiniteUpdateError, match=r"'noname\.0\.3' on rank 1") as caught:
                run.optimizer.step()
            assert "rank 0" not in str(caught.value)
            assert "rank 2" not in str(caught.value)
            after = bits([run.parameters, run.optimizer.state_dict()["state"]]) | stable(run, steps)
            assert after == before
        return everything(run.step(3))

    def stable(run: Run, steps: int) -> dict[str, bytes]:
        ours = run.optimizer.state_dict()["hvd_saef"]
        return bits(ours | {"gradients": [p.grad for p in run.parameters]}) if steps else {}

    assert together(3, lambda rank: fn(rank, True)) == together(3, lambda rank: fn(rank, False))


def test_nonfinite_gradients_of_several_workers_are_all_named() -> None:
    def fn(rank: int) -> None:
        run = Run(rank)
        run.set_gradients()
        if rank != 1:
            run.parameters[rank].grad = torch.full_like(run.parameters[rank], math.nan)
        with pytest.raises(NonFiniteUpdateError, match=r"'noname\.0\.0' on rank 0.*'noname\.0\.2' on rank 2"):
            run.optimizer.step()

    together(3, fn)


@pytest.mark.parametrize("options", [{}, {"local_steps": 3}, DENSE], ids=str)
def test_skip(options: dict[str, Any]) -> None:
    def fn(rank: int, bad: tuple[int, ...]) -> dict[str, bytes]:
        run = Run(rank, on_nonfinite="skip", **options)
        for step in range(7):
            run.set_gradients()
            before = everything(run)
            if step in bad:
                if rank == step % 2:
                    run.parameters[0].grad = torch.full_like(run.parameters[0], math.inf)
                run.optimizer.step()
                changed = {key for key, value in everything(run).items() if before.get(key) != value}
                assert changed == set()
            elif not (bad == () and step in (3, 4)):
                run.optimizer.step()
            run.taken += 1
        assert run.optimizer.stats()["skipped"] == len(bad)
        return bits([run.parameters, run.optimizer.state_dict()["state"], run.optimizer.stats()["rounds"]])

    assert together(2, lambda rank: fn(rank, (3, 4))) == together(2, lambda rank: fn(rank, ()))


def test_finite_gradients_whose_sum_overflows_are_fine() -> None:
    def fn(rank: int) -> None:
        run = Run(rank, lambda parameters: torch.optim.SGD(parameters, lr=1e-38))
        for parameter in run.parameters:
            parameter.grad = torch.full_like(parameter, 3e38)
        start = bits(run.parameters)
        run.optimizer.step()
        assert run.optimizer.stats()["rounds"] == 1
        assert bits(run.parameters) != start

    together(2, fn)


def test_a_second_averaging_is_warned_of() -> None:
    def fn(rank: int, skip: bool) -> None:
        run = Run(rank, **DENSE)
        run.set_gradients()
        run.optimizer.synchronize()
        with run.optimizer.skip_synchronize() if skip else contextlib.nullcontext():
            run.optimizer.step()
        run.step()

    for skip in (False, True):
        told = [text for _, text in warned(2, lambda rank, skip=skip: fn(rank, skip)) if "again" in text]  # type: ignore[misc]
        assert len(told) == (0 if skip else 2)


@pytest.mark.parametrize("frozen", [[0], [0, 1], []])
def test_freezing_after_backward_takes_nobody_out_of_the_mean(frozen: list[int]) -> None:
    def fn(rank: int) -> list[Tensor]:
        run = Run(rank, lambda parameters: torch.optim.SGD(parameters, lr=1.0), **DENSE)
        before = [parameter.detach().clone() for parameter in run.parameters]
        for parameter in run.parameters:
            parameter.grad = torch.full_like(parameter, 2.0 * (1 + rank))
        if rank in frozen:
            for parameter in run.parameters:
                parameter.requires_grad_(False)
        run.optimizer.step()
        return [old - p.detach() for old, p in zip(before, run.parameters, strict=True)]

    for moved in together(2, fn):
        for tensor in moved:
            torch.testing.assert_close(tensor, torch.full_like(tensor, 3.0))
