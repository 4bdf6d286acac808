"""The ways to exchange that are timed against each other, each built over the same memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import horovod.torch as hvd
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import hvd_saef
from benchmarks.models import Shape, StandIn
from benchmarks.timings import BASELINE, LOCAL
from hvd_saef.compression import BUILT_IN, Considered, DenseCompressor
from hvd_saef.planning import plan

ONE_BUCKET = 4096
"""MB of a bucket that takes every model here whole."""


@dataclass
class Trainer:
    """A model and its optimizer, whose step() exchanges."""

    model: torch.nn.Module
    optimizer: Any

    def step(self) -> None:
        """The step that is timed: everything a training loop does, but for the data."""
        self.optimizer.zero_grad()
        self.model().backward()
        self.optimizer.step()


@dataclass
class Memory:
    """What all methods of a rank share: the memory of parameters and momentum, and the loss's constants."""

    parameters: list[Tensor]
    constants: list[Tensor]
    momentum: list[Tensor]
    rows: int = 0
    """Of the batch that backward multiplies for each parameter."""

    @classmethod
    def of(cls, shapes: Sequence[Shape], seed: int, rows: int) -> Memory:
        """Memory for these shapes; `seed` makes the loss's constants, one for each rank."""
        own = torch.Generator().manual_seed(seed)
        constants = [torch.randn(shape, generator=own) for shape in shapes]
        return cls(
            [torch.empty(shape) for shape in shapes],
            constants,
            [torch.zeros(shape) for shape in shapes],
            rows,
        )

    def reset(self) -> None:
        """Back to where training starts."""
        start = torch.Generator().manual_seed(0)  # the same on all ranks, and nothing needs sending
        for parameter, momentum in zip(self.parameters, self.momentum, strict=True):
            parameter.normal_(generator=start)
            momentum.zero_()

    def trainer(
        self, wrap: Callable[[StandIn, torch.optim.Optimizer], tuple[torch.nn.Module, Any]]
    ) -> Trainer:
        """A model over this memory, with momentum SGD, wrapped by `wrap`."""
        model = StandIn(self.parameters, self.constants, self.rows)
        wrapped, optimizer = wrap(model, torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9))
        for parameter, momentum in zip(model.parameters(), self.momentum, strict=True):
            optimizer.state[parameter]["momentum_buffer"] = momentum
        return Trainer(wrapped, optimizer)


@dataclass(frozen=True)
class Method:
    """A way to exchange, and how it is to be timed."""

    name: str
    wrap: Callable[[StandIn, torch.optim.Optimizer], tuple[torch.nn.Module, Any]]
    theory: Callable[[Sequence[Shape], int], float]
    """Bytes that a worker sends a step, from the shapes and the number of workers."""
    warmup: int = 2
    """Steps that are not timed, after it is built."""
    period: int = 1
    """Steps are timed in multiples of this."""
    kept: bool = True
    """Built once; False: anew for each round, so that memory is free while others are timed."""
    gloo: bool = False
    """Whether torch.distributed must be set up."""


def _local(model: StandIn, optimizer: torch.optim.Optimizer) -> tuple[torch.nn.Module, Any]:
    return model, optimizer


def _horovod(
    compression: Any, label: str, model: StandIn, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, Any]:
    named = [(f"{label}.{name}", parameter) for name, parameter in model.named_parameters()]
    return model, hvd.DistributedOptimizer(optimizer, named_parameters=named, compression=compression)


def _ours(
    options: dict[str, Any], model: StandIn, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, Any]:
    named = model.named_parameters()
    return model, hvd_saef.DistributedOptimizer(optimizer, named_parameters=named, model=model, **options)


def _over_gloo(
    options: dict[str, Any], model: StandIn, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, Any]:
    return _ours(options | {"process_group": dist.group.WORLD}, model, optimizer)


def _ddp(
    hook: Callable[[], tuple[Any, Any]] | None, model: StandIn, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, Any]:
    # PowerSGD's buckets race on gloo and crash; with one bucket there is nothing to race with.
    one = isinstance(hook, partial)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=ONE_BUCKET if one else None)
    if hook is not None:
        state, function = hook()
        wrapped.register_comm_hook(state, function)
    return wrapped, optimizer


def _fp16() -> tuple[Any, Any]:
    return None, default_hooks.fp16_compress_hook


def _powersgd(rank: int) -> tuple[Any, Any]:
    # It exchanges everything before this iteration, and cannot begin before the third.
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    return state, powerSGD_hook.powerSGD_hook


def _by_plan(method: plan.Method, shapes: Sequence[Shape], workers: int) -> float:
    return method.bytes_sent([math.prod(shape) for shape in shapes], workers)


def _nothing(shapes: Sequence[Shape], workers: int) -> float:
    return 0.0


def powersgd_bytes(rank: int, shapes: Sequence[Shape], workers: int) -> float:
    """A ring allreduce of both factors, and of the tensors that are too small to be worth it."""
    numbers = 0
    for shape in shapes:
        size, sides = math.prod(shape), shape[0] + math.prod(shape[1:])
        numbers += rank * sides if len(shape) > 1 and 2 * rank * sides < size else size
    return 2 * (workers - 1) / workers * 4 * numbers


_PLANNED = {method.name: method for method in plan.METHODS}


def _own(considered: Considered) -> dict[str, Method]:
    """One of the library's methods: without error averaging, with it, and over torch.distributed."""
    options = {
        "compression": considered.compressor,
        "double_compression": considered.double_compression,
    }
    return {
        considered.spelling + suffix: Method(
            considered.title + ending,
            partial(_ours, options | {"averaging_period": period}),
            partial(_by_plan, _PLANNED[considered.title + ending]),
            period=period or 1,
            kept=False,
        )
        for suffix, ending, period in (("", "", None), ("-p16", ", p = 16", 16))
    } | {
        f"{considered.spelling}-gloo": Method(
            f"{considered.title}, gloo",
            partial(_over_gloo, options),
            partial(_by_plan, _PLANNED[considered.title]),
            kept=False,
            gloo=True,
        )
    }


def _ring(key: str, name: str, planned: str, wrap: Any, gloo: bool = False) -> dict[str, Method]:
    return {key: Method(name, wrap, partial(_by_plan, _PLANNED[planned]), gloo=gloo)}


def _power(rank: int) -> dict[str, Method]:
    wrap, theory = partial(_ddp, partial(_powersgd, rank)), partial(powersgd_bytes, rank)
    name = f"DDP PowerSGD rank {rank}"
    return {f"ddp-powersgd{rank}": Method(name, wrap, theory, warmup=4, gloo=True)}


METHODS: dict[str, Method] = {
    "local": Method(LOCAL, _local, _nothing),
    "sign-dc-overlap": Method(
        "sign DC, overlap",
        partial(_ours, {"overlap": True}),
        partial(_by_plan, _PLANNED["sign DC"]),
        kept=False,
    ),
    **{
        spelling: method
        for compressor in BUILT_IN
        if not issubclass(compressor, DenseCompressor)
        for considered in compressor.considered()
        for spelling, method in _own(considered).items()
    },
    **_ring("hvd", BASELINE, BASELINE, partial(_horovod, hvd.Compression.none, "float32")),
    **_ring("hvd-fp16", "Horovod fp16", "Horovod fp16", partial(_horovod, hvd.Compression.fp16, "fp16")),
    **_ring("ddp", "DDP", BASELINE, partial(_ddp, None), gloo=True),
    **_ring("ddp-fp16", "DDP fp16", "Horovod fp16", partial(_ddp, _fp16), gloo=True),
    **_power(1),
    **_power(4),
}
"""By their names on the command line."""
