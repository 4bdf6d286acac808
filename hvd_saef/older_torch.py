"""What older torch versions call differently. Every such difference is here, found by looking. Local."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def register_load_state_dict_pre_hook(module: nn.Module, hook: Callable[..., None]) -> Any:
    """Registers `hook(module, state_dict, prefix, ...)`, called before a load; returns its handle.

    Before torch 2.5 the method has an underscore, and passes the module only if it is asked to.
    """
    public = getattr(module, "register_load_state_dict_pre_hook", None)
    if public is not None:
        return public(hook)
    earlier: Any = module._register_load_state_dict_pre_hook
    return earlier(hook, with_module=True)


def note_step(optimizer: torch.optim.Optimizer) -> None:
    """Notes a step for schedulers that were made before wrapping: they watch this one and no other.

    Before torch 2.4 they count its steps.
    """
    noted = vars(optimizer)
    noted["_opt_called"] = True
    if "_step_count" in noted:
        noted["_step_count"] += 1


def raise_versions(tensors: Iterable[Tensor]) -> None:
    """Raises the tensors' version counters, so that autograd takes them for written in place.

    Before torch 2.5 the function takes one tensor at a time.
    """
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def copies_hold_numbers() -> bool:
    """Returns False where a deep copy of a tensor is fake: a shape without numbers.

    Older compilers copy modules in this way while a forward pass is compiled.
    """
    return type(copy.deepcopy(torch.empty(0))) is Tensor


def load_numpy() -> None:
    """Lets torch look for NumPy now, which it does once a process, at its first use of a number.

    torch 2.3 with NumPy 1 imports modules meanwhile, and if two threads begin with that at the same time,
    one holds what the other waits for, for ever. So it is done before any thread of ours starts.
    """
    torch.empty(1).fill_(1.0).numpy()
