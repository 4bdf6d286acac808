"""Checks the arguments of `hvd_saef.DistributedOptimizer`, and warns of effects users should know. Local."""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hvd_saef.averaging_modules import refuse_averaging_module
from hvd_saef.compression import Compression, Compressor, DenseCompressor, check_dense_below
from hvd_saef.memory.layout import ChooseCompressor, Layout
from hvd_saef.settings import Settings
from hvd_saef.transport.libraries import loaded_horovod
from hvd_saef.transport.process_sets import ranks_of, remember

Workers = Literal["rank", "node"] | Sequence[Any]
"""The values that the argument `worker` accepts."""
OTHER_OPS = ("Sum", "Adasum", "Min", "Max", "Product")


def check_horovod_arguments(op: Any, predivide: float) -> None:
    """Raises for arguments that Horovod accepts and that would have another meaning here.

    Raises RuntimeError for elastic Horovod, ValueError for an `op` other than hvd.Average or None, or a
    `predivide` other than 1.
    """
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        raise RuntimeError(
            "HOROVOD_ELASTIC=1: elastic Horovod is not supported, since a worker that leaves takes its "
            "error with it. Start the job without --min-np, --max-np and a host discovery script."
        )
    hvd = loaded_horovod()
    if op is not None and not (hvd and op == hvd.Average):
        named = next((f"hvd.{name}" for name in OTHER_OPS if hvd and op == getattr(hvd, name)), repr(op))
        raise ValueError(
            f"op={named}: only hvd.Average is allowed: what is applied is the mean of the workers' updates. "
            "For a sum, scale the learning rate by hvd.size()."
        )
    if predivide != 1.0:
        raise ValueError(
            f"gradient_predivide_factor={predivide!r}: only 1.0 is allowed: gradients are not summed, so "
            "there is nothing to divide before or after."
        )


ADAPTIVE = (
    torch.optim.Adam,
    torch.optim.AdamW,  # a subclass of Adam in newer torches alone
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.SparseAdam,
)
"""Torch's optimizers that divide updates by the size of past gradients and scale by nothing but the rate."""


def models_of(model: Any) -> list[nn.Module]:
    """Returns the modules that `model` (a module, a list of modules or None) holds.

    Raises TypeError for anything but modules, ValueError for a module that is a part of another given one.
    """
    models = [] if model is None else list(model) if isinstance(model, (list, tuple)) else [model]
    for one in models:
        if not isinstance(one, nn.Module):
            raise TypeError(f"model={model!r}: a torch.nn.Module, a list of them or None is allowed.")
        for part in one.modules():
            refuse_averaging_module(part)
    for outer, inner in itertools.permutations(models, 2):
        if any(part is inner for part in outer.modules()):
            raise ValueError(
                f"model=: {type(inner).__name__} is given, and is a part of {type(outer).__name__}, which is "
                "given too; in different modes they would see different points. Give the one that is called."
            )
    return models


def check_optimizer(optimizer: Any, methods: Sequence[str] = ()) -> None:
    """Raises TypeError unless `optimizer` can be wrapped.

    It must be a torch.optim.Optimizer that is not wrapped yet, uses one gradient a step, and has no method
    with the name of one of the wrapper's `methods`.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer={optimizer!r}: a torch.optim.Optimizer is allowed.")
    if hasattr(optimizer, "skip_synchronize"):
        raise TypeError(
            f"optimizer={type(optimizer).__name__} is a DistributedOptimizer already: give the torch "
            "optimizer, and wrap it once."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer=LBFGS: it evaluates its closure several times a step, with line searches that "
            "workers would end at different points. Every other optimizer of torch.optim is allowed."
        )
    name = type(optimizer).__name__
    if type(optimizer).__module__.startswith("torch.distributed."):
        raise TypeError(
            f"optimizer={name}: it exchanges parameters between ranks by itself, and each rank would hold "
            "the state of a part only. Wrap the optimizer of torch.optim that it is made of."
        )
    own = [method for method in methods if hasattr(optimizer, method)]
    if own and type(optimizer).__module__.startswith("accelerate."):
        raise TypeError(
            f"optimizer={name}: accelerate made it of a torch optimizer, and passes calls on to that. Give "
            "the torch optimizer to hvd_saef.DistributedOptimizer, and what that returns to "
            "accelerator.prepare() (docs/frameworks.md)."
        )
    if "train" in own or "eval" in own:
        raise TypeError(
            f"optimizer={name}: it has {' and '.join(f'{method}()' for method in own)} of its own, as "
            "schedule-free ones do, and evaluates at a point that it computes from state which stays on each "
            "worker: after an exchange that point is neither the consensus point x nor the same on all "
            "workers. Wrap an optimizer that trains and evaluates at one point, with a schedule of its rate."
        )
    if own:
        raise TypeError(
            f"optimizer={name}: it has {own[0]!r}, which is a method of what hvd_saef.DistributedOptimizer "
            "returns: one would hide the other. Rename it."
        )


def name_parameters(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]] | None
) -> dict[Tensor, str]:
    """Returns the name of every parameter; without `named_parameters`, made from its group and place.

    Checks the names as Horovod does: raises TypeError or ValueError for anything but unique names of all of
    the optimizer's parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if named_parameters is None:
        return {
            p: f"noname.{i}.{j}"
            for i, group in enumerate(optimizer.param_groups)
            for j, p in enumerate(group["params"])
        }
    allowed = "tuples (name, parameter) are allowed, as model.named_parameters() gives them"
    if not isinstance(named_parameters, Iterable):
        raise TypeError(f"named_parameters={named_parameters!r}: {allowed}.")
    pairs = list(named_parameters)
    for pair in pairs:
        fits = isinstance(pair, tuple) and len(pair) == 2
        if not (fits and isinstance(pair[0], str) and isinstance(pair[1], Tensor)):
            raise ValueError(f"named_parameters holds {pair!r}: {allowed}.")
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"named_parameters holds the name {name!r} twice: each must be unique.")
        seen.add(name)
    names = {parameter: name for name, parameter in sorted(pairs, key=lambda pair: pair[0])}
    for parameter in parameters:
        if parameter not in names:
            raise ValueError(
                f"named_parameters names no parameter of shape {tuple(parameter.shape)} that the optimizer "
                "has: pass the model.named_parameters() of all its models, or None."
            )
    return names


def compressor_chooser(compression: Any, dense_below: int = 0) -> ChooseCompressor:
    """Returns a function (name, parameter) -> Compressor, made from the argument `compression` by its type.

    Raises TypeError for anything that gives no compressor, ValueError for a wrong `dense_below`; the returned
    function raises them for what a callable `compression` gives.
    """
    check_dense_below(dense_below)
    allowed = (
        "a hvd_saef.Compressor (Compression.sign, .topk(ratio), .none, .fp16), hvd.Compression.none or "
        ".fp16, or a callable (name, parameter) -> Compressor is allowed"
    )
    fixed = _as_compressor(compression)
    if fixed is not None:
        fixed = _with_dense_below(fixed, dense_below)
        return lambda name, parameter: fixed
    if compression is Compression.topk:
        raise TypeError("compression=Compression.topk: call it with a ratio, Compression.topk(0.01) for 1 %.")
    if isinstance(compression, type) or not callable(compression):
        raise TypeError(f"compression={compression!r}: {allowed}.")

    def choose(name: str, parameter: Tensor) -> Compressor:
        value = compression(name, parameter)
        chosen = _as_compressor(value)
        if chosen is None:
            raise TypeError(f"compression={compression!r} gave {value!r} for parameter {name!r}: {allowed}.")
        return _with_dense_below(chosen, dense_below)

    return choose


def _with_dense_below(compressor: Compressor, dense_below: int) -> Compressor:
    """Returns the compressor, changed so that blocks of fewer than `dense_below` elements are sent dense."""
    if not dense_below or isinstance(compressor, DenseCompressor):
        return compressor
    if not hasattr(compressor, "dense_below"):
        raise ValueError(
            f"dense_below={dense_below}: {type(compressor).__name__} has no such setting, 0 is allowed. "
            "Compression.sign and .topk have it, and any dataclass of yours with a field of that name."
        )
    changed: Any = compressor
    return cast(Compressor, dataclasses.replace(changed, dense_below=dense_below))


def _as_compressor(value: Any) -> Compressor | None:
    if isinstance(value, Compressor):
        return value
    hvd = loaded_horovod()
    if hvd and value is hvd.Compression.none:
        return Compression.none
    if hvd and value is hvd.Compression.fp16:
        return Compression.fp16
    return None


def advise_on_adaptive_rates(optimizer: torch.optim.Optimizer, workers: int) -> None:
    """Warns that an adaptive optimizer makes smaller steps on local gradients, and says what to change."""
    if workers == 1 or not isinstance(optimizer, ADAPTIVE):
        return
    warnings.warn(
        f"{type(optimizer).__name__} divides each of the {workers} workers' updates by the size of its own "
        f"gradients, which have K = {workers} times the noise of their mean: at the same learning rate "
        f"the updates' mean is up to √K = {workers**0.5:.1f} times smaller than full precision's. Where this "
        f"rate suits full precision, try {workers**0.5:.1f} times the rate (docs/adam.md).",
        stacklevel=3,
    )


def give_advice(settings: Settings, compression: Any, models: Sequence[nn.Module]) -> None:
    """Warns of settings whose effects a user should know before training."""
    if not isinstance(compression, DenseCompressor) and isinstance(
        _as_compressor(compression), DenseCompressor
    ):
        warnings.warn(
            f"compression={compression.__name__} is Horovod's own: nothing is compressed below 16 bits. "
            "For 1 bit a parameter leave it out, or pass hvd_saef.Compression.sign.",
            stacklevel=3,
        )
    if not models and (settings.alpha > 0 or settings.beta > 0):
        warnings.warn(
            "parameters are stepped ahead while training, differently on each worker. Pass model=model to "
            "hvd_saef.DistributedOptimizer, or put evaluation and saving into "
            "`with optimizer.consensus():`, to see the consensus point x.",
            stacklevel=3,
        )


def warn_of_large_block(settings: Settings, layout: Layout, workers: int) -> None:
    """Warns of a block that is so large that the parts of a sharded server are uneven."""
    share, name = layout.largest_share()
    if settings.sharded(workers) and share * workers > 2:
        warnings.warn(
            f"the largest block, of parameter {name!r}, is {share:.0%} of all that is compressed: the "
            f"worker that serves it sends {share * workers:.1f} times the others' share. "
            "Set block_size to cut it, or server='replicated'.",
            stacklevel=3,
        )


def groups_of(worker: Workers) -> Literal["rank", "node"] | tuple[tuple[int, ...], ...]:
    """Returns the argument `worker` in plain values: "rank", "node", or a sorted tuple of groups of ranks.

    Records process sets in `worker` that the user made. Raises ValueError for another string, TypeError for
    anything else that is not allowed. Local.
    """
    if worker == "rank" or worker == "node":
        return worker
    allowed = '"rank", "node", or a list of Horovod process sets (or of lists of ranks) is allowed'
    if isinstance(worker, str):
        raise ValueError(f"worker={worker!r}: {allowed}.")
    try:
        groups = sorted(tuple(ranks_of(group)) for group in worker)
    except TypeError:
        raise TypeError(f"worker={worker!r}: {allowed}.") from None
    if not groups or not all(groups) or not all(type(rank) is int for group in groups for rank in group):
        raise TypeError(f"worker={worker!r}: {allowed}.")
    remember(worker)
    return tuple(groups)
