"""Learning-rate schedules and averaged models of torch.optim, made before and after wrapping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

import hvd_saef
from hvd_saef import Compression
from tests.problems import curved_valley, start_point
from tests.workers import NO_MODEL, Run, batch, bits, network, sgd, together, train, warned

pytestmark = pytest.mark.filterwarnings(NO_MODEL)

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
IDENTITY: dict[str, Any] = {"compression": Compression.none}
STEPS = 14
METRICS = [3.0, 2.0, 2.5, 2.6, 2.7, 1.0, 1.5, 1.4, 1.3, 1.2, 1.1, 1.1, 1.1, 1.1]


def chain(o: torch.optim.Optimizer) -> Any:
    """Two at once."""
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    )


def sequence(o: torch.optim.Optimizer) -> Any:
    """One after the other: a warm-up and a decay."""
    return lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)],
        milestones=[4],
    )


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7], 0.1),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=0.001),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.2, 0.1], total_steps=STEPS + 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=10, power=2.0),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (t + 1)]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "SequentialLR": sequence,
    "ChainedScheduler": chain,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.001, anneal_epochs=6),
}


def test_every_scheduler_is_here() -> None:
    """PyTorch may get more of them."""
    kinds = {
        n
        for n, kind in vars(lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)
    }
    assert kinds - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)


def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two that differ."""
    return [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.02, "weight_decay": 0.1}]


MAKES: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(groups(p), lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(groups(p), lr=0.05),
}


def settings(optimizer: Any) -> list[dict[str, Any]]:
    """Everything in the groups but the parameters."""
    return [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]


def advance(scheduler: Any, step: int) -> None:
    """One step of a schedule."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(METRICS[step])
    else:
        scheduler.step()


def unwrapped(name: str, make: Make) -> tuple[list[Any], list[Tensor], list[str]]:
    """The groups over time, where torch alone comes to, and its warnings."""
    seen: list[Any] = []
    parameters = [nn.Parameter(torch.tensor(array)) for array in start_point()]

    def fn(rank: int) -> None:
        optimizer = make(parameters)
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(STEPS):
            at = [p.detach().numpy().copy() for p in parameters]
            for p, slope in zip(parameters, curved_valley(0, step, at), strict=True):
                p.grad = None if slope is None else torch.tensor(slope)
            optimizer.step()
            advance(scheduler, step)
            seen.append(settings(optimizer))

    texts = warned(1, fn)
    return seen, [p.detach() for p in parameters], [text for _, text in texts]


@pytest.mark.parametrize("kind", MAKES)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_are_torchs(name: str, kind: str) -> None:
    """The groups over time, OneCycleLR's momentum too; the parameters; and nobody is warned."""
    expected, parameters, texts = unwrapped(name, MAKES[kind])
    assert not [text for text in texts if "optimizer.step()" in text]
    assert len({str(groups) for groups in expected}) > 1
    for workers, after in [(1, False), (1, True), (2, False), (4, True)]:
        results: dict[int, tuple[list[Any], list[Tensor]]] = {}

        def fn(
            rank: int, after: bool = after, results: dict[int, tuple[list[Any], list[Tensor]]] = results
        ) -> None:
            schedulers: list[Any] = []

            def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
                optimizer = MAKES[kind](parameters)
                if not after:
                    schedulers.append(SCHEDULERS[name](optimizer))
                return optimizer

            run = Run(0, make, dtype=torch.float64, **IDENTITY)  # worker 0's gradients on all
            if after:
                schedulers.append(SCHEDULERS[name](run.optimizer))
            seen = []
            for step in range(STEPS):
                run.step()
                advance(schedulers[0], step)
                seen.append(settings(run.optimizer))
                assert settings(run.inner) == seen[-1]
            results[rank] = seen, [p.detach() for p in run.parameters]

        advice = ("stepped ahead", "divides each of the")
        ours = [text for _, text in warned(workers, fn) if not any(known in text for known in advice)]
        assert sorted(ours) == sorted(texts * workers)
        for seen, reached in results.values():
            assert seen == expected
            for mine, theirs in zip(reached, parameters, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_a_schedule_that_runs_ahead_of_the_steps_is_still_warned_of() -> None:
    """The counter-test: that warnings would be seen."""

    def fn(rank: int) -> None:
        run = Run(rank)
        SCHEDULERS["StepLR"](run.optimizer).step()

    assert [text for _, text in warned(1, fn) if "before `optimizer.step()`" in text]


# -- averages of the model ------------------------------------------------------------------------------


def averaged(optimizer: Any, xs: list[dict[str, Tensor]]) -> None:
    """Note x."""
    xs.append({name: x.clone() for name, x in optimizer.state_dict()["hvd_saef"]["x"].items()})


def eval_forward(model: nn.Module) -> None:
    """As one evaluates."""
    with torch.no_grad():
        model.eval()(batch(9, 9))


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize(
    "how",
    [
        "consensus",
        "eval of the optimizer",
        "a forward pass in eval mode",
        "a state dict",
        pytest.param(
            "eval of the model",
            marks=pytest.mark.xfail(strict=True, reason="model.eval() alone calls no hook: b is averaged"),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:the largest block")
def test_an_averaged_model_is_an_average_of_x(how: str, workers: int) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        model = network()
        optimizer = hvd_saef.DistributedOptimizer(
            sgd(list(model.parameters())), model.named_parameters(), model=model
        )
        average, xs = swa_utils.AveragedModel(model), list[dict[str, Tensor]]()
        for step in range(6):
            train(model, optimizer, rank, step)
            averaged(optimizer, xs)
            if how == "consensus":
                with optimizer.consensus():
                    average.update_parameters(model)
                continue
            if how == "eval of the optimizer":
                optimizer.eval()
            elif how == "a forward pass in eval mode":
                eval_forward(model)
            elif how == "a state dict":
                model.state_dict()
            else:
                model.eval()
            average.update_parameters(model)
            optimizer.train()
            model.train()
        for name, mine in average.module.named_parameters():
            mean = torch.stack([x[name] for x in xs]).double().mean(0)
            torch.testing.assert_close(mine.double(), mean, rtol=0, atol=1e-6)
            apart = [(x[name] - mine.detach()).abs().max() for x in xs]
            assert min(map(float, apart)) > 1e-5
        assert int(average.n_averaged) == 6
        training = bits(dict(model.named_parameters()))
        assert bits(dict(average.eval().module.named_parameters())) != training
        average(batch(9, 9))  # the copy of the model has no hooks that move anything
        assert bits(dict(model.named_parameters())) == training
        return bits(dict(average.module.named_parameters()))

    first, *others = together(workers, fn)
    assert all(other == first for other in others)


def with_norm() -> nn.Sequential:
    """A network with statistics of its own."""
    return nn.Sequential(network(), nn.BatchNorm1d(2))


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("which", ["the average", "the model"])
@pytest.mark.filterwarnings("ignore:the largest block")
def test_update_bn(which: str, workers: int) -> None:
    """The statistics are those of activations at x (for the model, within consensus())."""
    loader = [batch(7, i) for i in range(3)]

    def fn(rank: int) -> dict[str, bytes]:
        model = with_norm()
        optimizer = hvd_saef.DistributedOptimizer(
            sgd(list(model.parameters())), model.named_parameters(), model=model
        )
        average = swa_utils.AveragedModel(model)
        for step in range(4):
            train(model, optimizer, rank, step)
        with optimizer.consensus():
            average.update_parameters(model)
            updated = average if which == "the average" else model
            swa_utils.update_bn(loader, updated)
        norm = updated.get_submodule("module.1" if updated is average else "1")
        assert isinstance(norm, nn.BatchNorm1d)
        x = optimizer.state_dict()["hvd_saef"]["x"]
        activations = []
        for inputs in loader:
            hidden = torch.tanh(inputs @ x["0.0.weight"].T + x["0.0.bias"])
            activations.append(hidden @ x["0.2.weight"].T + x["0.2.bias"])
        mean = torch.stack([a.mean(0) for a in activations]).mean(0)
        variance = torch.stack([a.var(0) for a in activations]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-5, atol=1e-6)
        train(model, optimizer, rank, 9)
        return bits([norm.running_mean, norm.running_var] if which == "the average" else {})

    first, *others = together(workers, fn)
    assert all(other == first for other in others)
