"""Problems that tests train on, in numpy, and the library's run of an oracle's setup."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import hvd_saef
from tests.oracle import Array, Gradient, Setup

SHAPES: tuple[tuple[int, ...], ...] = ((5, 7), (3,), (), (2, 3, 4))
STEPS = 30


def start_point(seed: int = 0) -> list[Array]:
    """The same start for every worker."""
    generator = np.random.default_rng(seed)
    return [np.asarray(generator.standard_normal(shape)) for shape in SHAPES]


@functools.cache
def noise_of(worker: int, step: int, shapes: tuple[tuple[int, ...], ...]) -> list[Array]:
    """The noise in a worker's gradients of one step; drawn once, as tests ask for it many times."""
    generator = np.random.default_rng([7, worker, step])
    return [np.asarray(generator.standard_normal(shape)) for shape in shapes]


def curved_valley(worker: int, step: int, parameters: list[Array]) -> list[Array | None]:
    """Gradients of a curved problem with noise of the worker and step, none for parameter 1 at times."""
    noise = noise_of(worker, step, tuple(parameter.shape for parameter in parameters))
    gradients: list[Array | None] = []
    for i, parameter in enumerate(parameters):
        center = np.cos(np.arange(parameter.size)).reshape(parameter.shape) + 0.2 * worker
        slope = parameter - center + 0.5 * np.sin(3 * parameter)
        gradients.append(np.asarray(slope + 0.3 * noise[i]))
        if i == 1 and (worker + step) % 5 == 0:
            gradients[-1] = None
    return gradients


def schedule(step: int) -> float:
    """A learning rate that warms up and is cut."""
    return 0.05 * min(1.0, (step + 1) / 4) * (0.1 if step >= 20 else 1.0)


def compressor(setup: Setup) -> hvd_saef.Compressor:
    """The library's compressor for an oracle's."""
    if setup.compressor == "topk":
        return hvd_saef.Compression.topk(setup.ratio)
    return hvd_saef.Compression.sign if setup.compressor == "sign" else hvd_saef.Compression.none


def torch_optimizer(
    setup: Setup, parameters: list[torch.nn.Parameter] | list[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The torch optimizer that an oracle's setup names, of parameters or of groups of them."""
    lr = setup.lr(0)
    if setup.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=lr, betas=setup.betas, eps=setup.eps, weight_decay=setup.weight_decay
        )
    momentum = 0.0 if setup.optimizer == "sgd" else setup.momentum
    nesterov = setup.optimizer == "nesterov"
    return torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=setup.weight_decay
    )


def wrap(setup: Setup, optimizer: torch.optim.Optimizer, **options: Any) -> Any:
    """`hvd_saef.DistributedOptimizer` with an oracle's settings."""
    return hvd_saef.DistributedOptimizer(
        optimizer,
        compression=options.pop("compression", compressor(setup)),
        feedback=setup.feedback,  # type: ignore[arg-type]
        step_ahead=setup.step_ahead,
        server_step_ahead=setup.server_step_ahead,
        double_compression=setup.double_compression,
        averaging_period=setup.averaging_period,
        local_steps=setup.local_steps,
        warmup_steps=setup.warmup_steps,
        block_size=setup.block_size,
        **options,
    )


@dataclass
class Outcome:
    """Where one worker of the library came to, as the oracle's Trajectory tells it."""

    x: list[Array]
    parameters: list[Array]
    errors: list[Array]
    server_error: dict[str, tuple[int, Array]]
    stats: dict[str, float]


def run_library(
    setup: Setup,
    rank: int,
    start: list[Array],
    gradient: Gradient = curved_valley,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    each_step: Callable[[int, Any], None] = lambda step, optimizer: None,
    place: Callable[[int, torch.Tensor], torch.Tensor] = lambda number, tensor: tensor,
    into_groups: Callable[[list[torch.nn.Parameter]], list[Any]] = list,
    **options: Any,
) -> Outcome:
    """Worker `rank`'s run of `setup` through `hvd_saef.DistributedOptimizer`.

    `place` puts a parameter's start elsewhere in memory, and `into_groups` makes groups of the parameters.
    """
    parameters = [
        torch.nn.Parameter(place(number, torch.tensor(array, dtype=dtype)))
        for number, array in enumerate(start)
    ]
    optimizer = wrap(setup, torch_optimizer(setup, into_groups(parameters)), **options)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = setup.lr(step)
        at = [parameter.detach().double().cpu().numpy().copy() for parameter in parameters]
        for parameter, slope in zip(parameters, gradient(rank, step, at), strict=True):
            device = parameter.device
            parameter.grad = None if slope is None else torch.tensor(slope, dtype=dtype, device=device)
        optimizer.step()
        each_step(step, optimizer)
    return outcome(optimizer, parameters)


def outcome(optimizer: Any, parameters: list[torch.nn.Parameter]) -> Outcome:
    """What there is to compare, from public methods only."""
    held = [parameter.detach().double().cpu().numpy().copy() for parameter in parameters]
    state = optimizer.state_dict()["hvd_saef"]
    names = list(state["x"])
    return Outcome(
        x=[state["x"][name].double().cpu().numpy() for name in names],
        parameters=held,
        errors=[state["errors"][name].double().cpu().numpy() for name in names],
        server_error={
            name: (piece["start"], piece["values"].double().cpu().numpy())
            for name, piece in state["server_errors"].items()
        },
        stats=optimizer.stats(),
    )


def worst(ours: list[Array], theirs: list[Array]) -> float:
    """The largest difference relative to 1 or the number's size; infinite where one is not a number."""
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.size:
            difference = float(np.max(np.abs(a - b) / np.maximum(1.0, np.abs(b))))
            largest = max(largest, math.inf if math.isnan(difference) else difference)
    return largest


def same_bits(a: list[Array], b: list[Array]) -> bool:
    """Whether all arrays are equal to the bit, the sign of zero included."""
    return all(left.tobytes() == right.tobytes() for left, right in zip(a, b, strict=True))
