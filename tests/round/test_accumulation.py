"""Several backward passes a step, several steps a round, Horovod's clipping recipe, closures with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef import Compression
from tests.workers import NO_MODEL, Run, batch, bits, everything, network, sgd, together

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
]

DENSE: dict[str, Any] = {"compression": Compression.none, "feedback": "none"}
IDENTITY: dict[str, Any] = {"compression": Compression.none}
SETTINGS: dict[str, dict[str, Any]] = {
    "sign": {},
    "three local steps": {"local_steps": 3},
    "ef, single-way": {"feedback": "ef", "double_compression": False, "compression": Compression.topk(0.2)},
    "identity": IDENTITY,
    "dense": DENSE,
}
WORKERS = [1, 2, 4]


def wrapped(model: nn.Module, **options: Any) -> Any:
    """SGD on all of a model."""
    base = sgd(list(model.parameters()))
    return hvd_saef.DistributedOptimizer(base, model.named_parameters(), model=model, **options)


def loss_of(model: nn.Module, rank: int, number: int) -> Tensor:
    """The loss on one micro-batch, the `number`-th of all."""
    inputs = batch(rank, number, next(model.parameters()).dtype)
    loss: Tensor = ((model(inputs) - inputs[:, :2].cos()) ** 2).mean()
    return loss


def all_bits(model: nn.Module, optimizer: Any) -> dict[str, bytes]:
    """Of parameters and state, but for what the settings say."""
    return bits([dict(model.named_parameters()), optimizer.state_dict()])


# -- several backward passes a step -----------------------------------------------------------------------


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("last", [3, 1], ids=["whole", "a partial last accumulation"])
def test_gradients_of_several_backward_passes_add_up(
    options: dict[str, Any], last: int, workers: int
) -> None:
    """As with Horovod: three calls of backward(), one step, on the sum (not the mean) of the gradients."""

    def accumulated(rank: int) -> dict[str, bytes]:
        model = network()
        optimizer = wrapped(model, backward_passes_per_step=3, **options)
        for step, passes in enumerate([3, 3, 3, last]):
            optimizer.zero_grad()
            for i in range(passes):
                before = bits(dict(model.named_parameters()))
                loss_of(model, rank, 10 * step + i).backward()
                assert bits(dict(model.named_parameters())) == before
            optimizer.step()
            assert bits(dict(model.named_parameters())) != before
        return all_bits(model, optimizer)

    def by_hand(rank: int, scale: float = 1.0) -> dict[str, bytes]:
        model = network()
        optimizer = wrapped(model, **options)
        for step, passes in enumerate([3, 3, 3, last]):
            parameters = list(model.parameters())
            losses = [loss_of(model, rank, 10 * step + i) for i in range(passes)]
            of_passes = [torch.autograd.grad(loss, parameters) for loss in losses]
            for parameter, *gradients in zip(parameters, *of_passes, strict=True):
                parameter.grad = gradients[0].clone()
                for gradient in gradients[1:]:
                    parameter.grad += gradient
                parameter.grad *= scale
            optimizer.step()
        return all_bits(model, optimizer)

    ours = together(workers, accumulated)
    assert ours == together(workers, by_hand)
    assert ours != together(workers, lambda rank: by_hand(rank, 1 / 3))


def test_the_number_of_passes_can_be_changed() -> None:
    def fn(rank: int) -> dict[str, bytes]:
        model = network()
        optimizer = wrapped(model, backward_passes_per_step=2)
        for step in range(4):
            optimizer.set_backward_passes_per_step(step + 1)
            optimizer.zero_grad()
            for i in range(step + 1):
                loss_of(model, rank, 10 * step + i).backward()
            optimizer.step()
        optimizer.eval()
        return bits(dict(model.named_parameters()))

    first, second = together(2, fn)
    assert first == second


# -- several local steps a round ---------------------------------------------------------------------------


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("flush", [True, False])
def test_flush_at_the_end_of_each_epoch(workers: int, flush: bool) -> None:
    """Rounds of 3, 3 and 1 steps, by hand: with C = identity, x moves by the mean of what workers did."""
    epochs, steps = 2, 7

    def ours(rank: int) -> tuple[list[Tensor], float]:
        run = Run(rank, plain_sgd, dtype=torch.float64, local_steps=3, **IDENTITY)
        for _ in range(epochs):
            run.step(steps)
            if flush:
                run.optimizer.flush()
                assert run.ours("local_steps_done") == 0
        return run.x(), run.optimizer.stats()["rounds"]

    lengths = [3, 3, 1] * epochs if flush else [3] * (epochs * steps // 3)
    results = together(workers, ours)
    assert {rounds for _, rounds in results} == {len(lengths)}

    def alone(rank: int) -> list[Tensor]:
        run = Run(0, plain_sgd, dtype=torch.float64, **DENSE)
        x = [parameter.detach().clone() for parameter in run.parameters]
        taken = 0
        for length in lengths:
            ends = []
            for worker in range(workers):
                run.rank, run.taken = worker, taken
                with torch.no_grad():
                    torch._foreach_copy_(list(run.parameters), x)
                run.step(length)
                ends.append([parameter.detach().clone() for parameter in run.parameters])
            x = [torch.stack(list(reached)).mean(0) for reached in zip(*ends, strict=True)]
            taken += length
        return x

    for x, _ in results:
        for mine, theirs in zip(x, together(1, alone)[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def plain_sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Without momentum."""
    return torch.optim.SGD(parameters, lr=0.05)


# -- clipping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("averaged", [False, True], ids=["local gradients", "averaged gradients"])
def test_horovods_clipping_recipe_by_hand(workers: int, averaged: bool) -> None:
    """With errors, every worker clips its own gradient; where gradients are averaged, all clip the mean."""
    gradients = [torch.tensor([3.0, 4.0]) * (k + 1) * (-1) ** k for k in range(workers)]
    norms = [5.0 * (k + 1) for k in range(workers)]
    if averaged:
        mean = torch.stack(gradients).mean(0)
        expected = 1.0 - 0.1 * mean * min(1.0, 7.0 / (float(mean.norm()) + 1e-6))
    else:
        clipped = [g * min(1.0, 7.0 / (n + 1e-6)) for g, n in zip(gradients, norms, strict=True)]
        expected = 1.0 - 0.1 * torch.stack(clipped).mean(0)

    def fn(rank: int) -> None:
        parameter = nn.Parameter(torch.ones(2))
        optimizer = hvd_saef.DistributedOptimizer(
            torch.optim.SGD([parameter], lr=0.1), **(DENSE if averaged else IDENTITY)
        )
        (parameter * gradients[rank]).sum().backward()
        optimizer.synchronize()
        norm = nn.utils.clip_grad_norm_([parameter], 7.0)
        with optimizer.skip_synchronize():
            optimizer.step()
        assert float(norm) == pytest.approx(float(mean.norm()) if averaged else norms[rank])
        with optimizer.consensus():
            torch.testing.assert_close(parameter.detach(), expected)

    together(workers, fn)


# -- closures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_closure_accumulates_and_clips(options: dict[str, Any], workers: int) -> None:
    """It is called once a step, at the training point, and gives what the calls without it give."""

    def fn(rank: int, step: Callable[[Any, Callable[[], float]], float]) -> dict[str, bytes]:
        run, calls = Run(rank, backward_passes_per_step=2, **options), list[int]()

        def closure() -> float:
            calls.append(run.taken)
            run.set_gradients()
            for parameter in run.parameters:
                if parameter.grad is not None:
                    parameter.grad += 0.5 * parameter.detach()
            return float(nn.utils.clip_grad_norm_(run.parameters, 0.5))

        losses = []
        for _ in range(7):
            losses.append(step(run.optimizer, closure))
            run.taken += 1
        assert calls == list(range(7))
        assert min(losses) > 0.5
        run.optimizer.flush()
        return everything(run) | bits({"losses": losses})

    def without(optimizer: Any, closure: Callable[[], float]) -> float:
        loss = closure()
        optimizer.step()
        return loss

    def through_it(optimizer: Any, closure: Callable[[], float]) -> float:
        loss: float = optimizer.step(closure)
        return loss

    with_closure = together(workers, lambda rank: fn(rank, through_it))
    assert with_closure == together(workers, lambda rank: fn(rank, without))
