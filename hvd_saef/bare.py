"""Copies a model without the library's hooks, to export it, average it or read it elsewhere. Local."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from hvd_saef.round.owners import at_consensus

M = TypeVar("M", bound=nn.Module)


def bare_model(model: M) -> M:
    """Returns a deep copy of `model` at the consensus point x, with nothing of hvd_saef in it.

    >>> torch.jit.script(hvd_saef.bare_model(model))

    `model` may be a part of a model. Use the copy for torch.jit, torch.export and torch.onnx, which cannot
    handle the library's hooks; for a file with the whole module that is read where hvd_saef is not installed;
    and for torch.optim.swa_utils.AveragedModel.

    Every parameter that a distributed optimizer trains is at x in the copy, whether or not that optimizer was
    given `model=`. The copy has the mode (training or evaluation) of `model`. `model` itself keeps its mode,
    and its parameters stay where they were. Buffers, such as BatchNorm's statistics, are those of this rank.
    The copy does not follow training.

    Local: no other rank needs to call this function. Do not call it between a forward pass and its backward
    pass.
    """
    with at_consensus(model.parameters()):
        bare = copy.deepcopy(model)
    for part in bare.modules():
        for held in vars(part).values():
            if isinstance(held, dict):
                for key in [key for key, value in held.items() if _is_ours(value)]:
                    del held[key]
    return bare


def _is_ours(value: object) -> bool:
    """Returns True if `value` is a hook of the library: a method of ModelHooks, or torch's wrapper of one."""
    from hvd_saef.round.model_hooks import ModelHooks  # loads torch's compiler, as optimizers do too

    hook = getattr(value, "hook", value)
    return isinstance(getattr(hook, "__self__", None), ModelHooks)
