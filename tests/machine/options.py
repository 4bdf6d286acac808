"""What a program's optimizers are made with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import hvd_saef
from hvd_saef import Compression
from tests.machine.net import LAYERS, Net, of_layers

RATIO = 0.3
"""Top-K's."""
WEIGHT_DECAY = 0.02


@dataclass(frozen=True, repr=False)
class Options:
    """All that is fixed while a program runs."""

    workers: int = 2
    ranks: int = 1
    """Ranks a worker: above 1, workers are nodes."""
    compressor: str = "sign"
    """"sign", "topk", "none" or "fp16"."""
    feedback: str = "saef"
    alpha: float = 1.0
    beta: float = 0.0
    double: bool = True
    period: int | None = None
    local_steps: int = 1
    warmup: int = 0
    block_size: int | None = None
    server: str = "auto"
    small_buckets: bool = False
    """Whether each parameter has a bucket of its own, or all are in one."""
    optimizer: str = "sgd"
    """"sgd", "sgdm" or "adamw"."""
    overlap: tuple[bool, ...] = (False,)
    """Of each wrapped optimizer: of two the first has the layers first and extra, the other has second."""
    hooked: bool = True
    """Whether they are given model=."""
    on_nonfinite: str = "raise"
    extra: str = "there"
    """The layer extra is "there" from the start, "frozen", or "later" added to the first optimizer."""
    seed: int = 0

    def __repr__(self) -> str:
        return plain_repr(self)

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.workers * self.ranks

    @property
    def sharded(self) -> bool:
        """Whether each worker serves a part."""
        if self.server == "auto":
            return self.double and self.beta == 0 and self.workers > 1
        return self.server == "sharded"

    @property
    def dense(self) -> bool:
        """Whether updates travel as they are, or in half precision."""
        return self.compressor in ("none", "fp16")

    @property
    def averages_gradients(self) -> bool:
        """Whether this is Horovod's arithmetic: nothing is kept but the parameters."""
        return self.feedback == "none" and self.dense and self.local_steps == 1

    @property
    def ahead(self) -> tuple[float, float]:
        """Row 2's alpha and beta."""
        return self.alpha if self.feedback == "saef" else 0.0, self.beta

    def layers(self, part: int) -> tuple[str, ...]:
        """The layers that one of the optimizers has, or will have."""
        if len(self.overlap) == 1:
            return LAYERS
        return ("first", "extra") if part == 0 else ("second",)

    def names(self, part: int) -> tuple[str, ...]:
        """The parameters that it is given at the start."""
        layers = self.layers(part)
        return of_layers([layer for layer in layers if layer != "extra" or self.extra != "later"])


def plain_repr(value: Any) -> str:
    """A dataclass as Python code, without what is as by default."""
    fields = [
        f"{field.name}={getattr(value, field.name)!r}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    return f"{type(value).__name__}({', '.join(fields)})"


def make_inner(options: Options, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer to wrap."""
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=0.05, weight_decay=WEIGHT_DECAY)
    momentum = 0.9 if options.optimizer == "sgdm" else 0.0
    return torch.optim.SGD(parameters, lr=0.05, momentum=momentum, weight_decay=WEIGHT_DECAY)


def make_optimizers(options: Options, net: Net) -> list[Any]:
    """The wrapped optimizers, each given all names and the whole model, as users do. Collective."""
    named = dict(net.named_parameters())
    if options.extra == "frozen":
        net.extra.requires_grad_(False)
    compressor = {
        "sign": Compression.sign,
        "topk": Compression.topk(RATIO),
        "none": Compression.none,
        "fp16": Compression.fp16,
    }[options.compressor]
    return [
        hvd_saef.DistributedOptimizer(
            make_inner(options, [named[name] for name in options.names(part)]),
            net.named_parameters(),
            compressor,
            model=net if options.hooked else None,
            feedback=options.feedback,  # type: ignore[arg-type]
            step_ahead=options.alpha,
            server_step_ahead=options.beta,
            double_compression=options.double,
            averaging_period=options.period,
            local_steps=options.local_steps,
            warmup_steps=options.warmup,
            block_size=options.block_size,
            server=options.server,  # type: ignore[arg-type]
            bucket_bytes=1 if options.small_buckets else 1 << 20,
            overlap=overlap,
            on_nonfinite=options.on_nonfinite,  # type: ignore[arg-type]
            worker="node" if options.ranks > 1 else "rank",
        )
        for part, overlap in enumerate(options.overlap)
    ]
