"""Refuses wrappers of torch's around a model that exchange gradients or parameters by themselves. Local.

Users make such wrappers before the optimizer is wrapped, and frameworks also later. So the calls are watched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from hvd_saef.round.owners import owners

AVERAGES = (
    "DistributedDataParallel averages the gradients in full precision, and what is to be compressed would be "
    "sent already: use the module in it, unwrapped. docs/frameworks.md says how accelerate, Trainer and "
    "Lightning leave it unwrapped."
)
SHARDS = (
    "FSDP keeps a part of each parameter on each rank, and workers must hold whole parameters: use the "
    "module without FSDP."
)


def refuse_averaging_module(module: nn.Module) -> None:
    """Raises TypeError for a wrapper of torch's that exchanges gradients or parameters by itself."""
    reason = _reason(module)
    if reason:
        raise TypeError(f"model={type(module).__name__}(...): {reason}")


def _reason(module: nn.Module) -> str:
    """Returns why `module` is refused, or "" if it is not."""
    kinds = {base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch.")}
    if "DistributedDataParallel" in kinds:
        return AVERAGES
    return SHARDS if kinds & {"FullyShardedDataParallel", "FSDPModule"} else ""


def _watch(module: nn.Module, name: str, part: nn.Module | None) -> None:
    """Lets the calls of `module` be refused, if it is such a wrapper. torch calls this for each new part."""
    if name == "module" and _reason(module):  # the name in DistributedDataParallel
        module.register_forward_pre_hook(_refuse_training)


def _refuse_training(module: nn.Module, args: Any) -> None:
    """Raises TypeError if gradients will be taken of parameters that an optimizer of ours trains."""
    if torch.is_grad_enabled() and owners(module.parameters()):
        name = type(module).__name__
        raise TypeError(f"{name} was called, around parameters that hvd_saef trains: {_reason(module)}")


register_module_module_registration_hook(_watch)
