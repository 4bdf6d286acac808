"""Takes local steps of some of an optimizer's parameters, in this thread or in another. Local."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

PACKAGE = "hvd_saef."
"""Step hooks of this package do nothing in a partial step, so they do not count as users' hooks."""

LocalStep = Callable[[], None]


class StepCode:
    """Finds whose code an optimizer's step calls, which decides in which threads the step may run."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self._torchs = type(inner).__module__.startswith("torch.optim.")
        # A hook's handle refers to all hooks: there is no other public way to list them.
        own = inner.register_step_pre_hook(_nothing), inner.register_step_post_hook(_nothing)
        self._handles = *own, *_for_all_optimizers()
        weakref.finalize(self, remove_hooks, own)

    def suits_other_threads(self) -> bool:
        """Returns True if another thread may take steps while this thread computes gradients.

        Only torch's own optimizers without users' hooks qualify: the code of other classes, and of hooks,
        expects that nothing else runs at the same time.
        """
        return self._torchs and not self.has_hooks()

    def has_hooks(self) -> bool:
        """Returns True if users' step hooks are registered, with this optimizer or with all optimizers."""
        hooks = [hook for handle in self._handles for hook in (handle.hooks_dict_ref() or {}).values()]
        ours = ((getattr(hook, "__module__", None) or "").startswith(PACKAGE) for hook in hooks)
        return not all(ours)


@cache
def _for_all_optimizers() -> Sequence[RemovableHandle]:
    return register_optimizer_step_pre_hook(_nothing), register_optimizer_step_post_hook(_nothing)


def _nothing(*_: object) -> None:
    pass


def remove_hooks(handles: Iterable[RemovableHandle]) -> None:
    """Removes the hooks of these handles, once the object that used the hooks is gone."""
    for handle in handles:
        handle.remove()


def step_elsewhere(inner: torch.optim.Optimizer, parameters: Collection[Tensor]) -> LocalStep:
    """Returns a local step of these parameters, with the options of now, for another thread to take.

    A stand-in optimizer takes the step. It has groups of its own and shares the rest with `inner`, so that
    the groups of `inner` never change. The step raises RuntimeError as :func:`step_here` does.
    """
    stand_in = object.__new__(type(inner))
    # "step" is left out: a scheduler may have stored a patched step() of `inner` under this name.
    vars(stand_in).update({name: value for name, value in vars(inner).items() if name != "step"})
    now = [dict(group) for group in inner.param_groups]

    def step() -> None:
        wanted = set(parameters)
        parts = [group | {"params": _of(group, wanted)} for group in now]
        stand_in.param_groups = [part for part in parts if part["params"]]
        with _unchanged_options(stand_in.param_groups):
            stand_in.step()

    return step


def step_here(inner: torch.optim.Optimizer, local_step: LocalStep, parameters: Collection[Tensor]) -> None:
    """Takes `local_step` with only these parameters in the groups of `inner`; no step without parameters.

    Raises RuntimeError if the step changes options, as buckets of one step would then have different ones.
    """
    if parameters:
        with _only(inner.param_groups, set(parameters)), _unchanged_options(inner.param_groups):
            local_step()


Options = list[dict[str, Any]]


def options_of(groups: Iterable[dict[str, Any]]) -> Options:
    """Returns a record of the groups' options, without the parameters, for :func:`changed_option`.

    A later record differs if an option was replaced or changed in place.
    """
    return [
        {
            key: (id(value), value._version) if isinstance(value, Tensor) else repr(value)
            for key, value in group.items()
            if key != "params"
        }
        for group in groups
    ]


def changed_option(before: Options, after: Options) -> str | None:
    """Returns the name of an option that differs between two records of the same groups, or None."""
    for old, new in zip(before, after, strict=True):
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            return changed[0]
    return None


@contextmanager
def _unchanged_options(groups: list[dict[str, Any]]) -> Iterator[None]:
    before = options_of(groups)
    yield
    changed = changed_option(before, options_of(groups))
    if changed is not None:
        raise RuntimeError(
            f"the optimizer's step changes {changed!r} of its parameter group, and with overlap=True "
            "it is taken once a bucket: pass overlap=False."
        )


def _of(group: dict[str, Any], wanted: Collection[Tensor]) -> list[Tensor]:
    return [p for p in group["params"] if p in wanted]


@contextmanager
def _only(groups: list[dict[str, Any]], wanted: Collection[Tensor]) -> Iterator[None]:
    """Keeps, inside the context, only the parameters `wanted` in `groups`; restores the groups after it."""
    whole = [(group, group["params"]) for group in groups]
    for group, _ in whole:
        group["params"] = _of(group, wanted)
    groups[:] = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        groups[:] = [group for group, _ in whole]
        for group, everything in whole:
            group["params"] = everything
