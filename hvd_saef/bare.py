"""A model as it would be without this library: to export, to average over time, to read elsewhere. Local."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from hvd_saef.round.model_hooks import ModelHooks, at_consensus

M = TypeVar("M", bound=nn.Module)


def bare_model(model: M) -> M:
    """A deep copy of `model`, or of a part of it, at the consensus point x, with nothing of hvd_saef in it.

    >>> torch.jit.script(hvd_saef.bare_model(model))

    For torch.jit, torch.export and torch.onnx, which our hooks on the model get in the way of; for a file
    with the whole module, to be read where there is no hvd_saef; and for torch.optim.swa_utils.AveragedModel.
    The parameters of all optimizers that train any of them are at x in the copy, whether or not these were
    given `model=`, and whatever mode the model is in, which the copy keeps; so does `model`, which stays
    where it was. Buffers, as BatchNorm's statistics, are this rank's. The copy does not follow training.

    Local: no other rank need call it. Not between a forward pass and its backward pass.
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
    """Whether it is a hook of ours, as torch keeps it: a method as it is, or with something around it."""
    hook = getattr(value, "hook", value)
    return isinstance(getattr(hook, "__self__", None), ModelHooks)
