"""The hooks on `model=`, which move the parameters to the right point for forward and state dicts. Local."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvd_saef.older_torch import copies_hold_numbers, register_load_state_dict_pre_hook
from hvd_saef.round.modes import Modes

MOVED_SINCE = (
    "the parameters were moved between a forward pass and its backward pass, which needs them as they were "
    "(autograd says 'modified by an inplace operation'): a forward pass in the other mode, a state_dict() "
    "or optimizer.eval() came between. Parameters are stepped ahead while training, and an evaluation moves "
    "them to the consensus point x. Evaluate before the forward pass that is trained on, or after backward()."
)


class ModelHooks:
    """The hooks on `model=`. A copy or a pickle of the model holds x, and the hooks in it do nothing."""

    def __init__(self, modes: Modes | None, on_load: Callable[[], None] = lambda: None) -> None:
        self._modes = modes
        self._on_load = on_load
        self._handles: list[Any] = []
        self._loading: nn.Module | None = None
        self._missing: list[str] | None = None
        """The missing keys' list of the load under way; `_loading` is the outermost module of this load."""

    def __reduce__(self) -> tuple[Any, ...]:
        if self._modes is not None:  # torch.save writes the tensors after all objects, so they will hold x
            self._modes.visit_x()
        return ModelHooks, (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelHooks:
        if self._modes is not None and self._modes.state is not None and copies_hold_numbers():
            self._modes.visit_x()
            with torch.no_grad():
                for slot in self._modes.state.layout.slots:
                    if id(slot.parameter) in memo:  # copied earlier, at the training point
                        memo[id(slot.parameter)].copy_(slot.parameter)
        return ModelHooks(None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # otherwise every copy breaks the graph
    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Moves the parameters to x for evaluation, or to the training point for training."""
        if self._modes is None:
            return
        if module.training:
            self._modes.leave_x()
        else:
            self._modes.visit_x()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Lets the backward pass, if one follows, begin with a check that the parameters have not moved."""
        if self._modes is None or not torch.is_grad_enabled():
            return
        look = _LookBack(self._modes)
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(look)

    def before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Moves the parameters to x, so that x is saved or broadcast."""
        if self._modes is not None:
            self._modes.visit_x()

    def before_load(
        self, module: nn.Module, state: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *_: Any
    ) -> None:
        """Moves the parameters to x, so that parameters missing in a partial state hold x too."""
        if self._modes is not None:
            self._modes.visit_x()
            if missing is not self._missing:  # a new list means a new load
                self._loading, self._missing = module, missing

    def after_load(self, module: nn.Module, incompatible: Any) -> None:
        """Reports, once per load, that the parameters were replaced: what was loaded is the new x."""
        if self._modes is not None and self._loading in (None, module):
            self._loading = self._missing = None
            self._on_load()
            self._modes.note()

    def attach(self, models: Sequence[nn.Module]) -> None:
        """Registers the hooks with `models`, and removes those of optimizers that are no longer used."""
        called = {id(module): module for module in _with_forward(models)}
        parts = {id(part): part for model in models for part in model.modules()}
        for module in parts.values():
            hooks = _of_models.setdefault(module, [])
            for hook in [hook for hook in hooks if hook._modes is None or hook._modes.taken is not None]:
                for handle in hook._handles:
                    handle.remove()
                hooks.remove(hook)
        for module in called.values():
            _of_models[module].append(self)
            self._handles += [
                module.register_forward_pre_hook(self.before_forward),
                module.register_forward_hook(self.after_forward),
            ]
        for part in parts.values():  # for model.encoder.state_dict(), or a module in torch.compile
            self._handles += [
                part.register_state_dict_pre_hook(self.before_state_dict),  # type: ignore[no-untyped-call]
                register_load_state_dict_pre_hook(part, self.before_load),
                part.register_load_state_dict_post_hook(self.after_load),  # type: ignore[no-untyped-call]
            ]


_of_models: weakref.WeakKeyDictionary[nn.Module, list[ModelHooks]] = weakref.WeakKeyDictionary()


class _LookBack:
    """Raises RuntimeError if the parameters were moved between a forward pass and its backward pass.

    It is called when the backward pass begins, before any parameter is used.
    """

    def __init__(self, modes: Modes) -> None:
        self._modes = weakref.ref(modes)  # the graph may outlive the optimizer
        self._journeys = modes.journeys

    def __call__(self, gradients: Any) -> None:
        modes = self._modes()
        if modes is not None and modes.journeys != self._journeys:
            raise RuntimeError(MOVED_SINCE)


def _with_forward(models: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yields the modules that can be called: for a container without a forward, its children instead."""
    for model in models:
        if getattr(model.forward, "__func__", None) is nn.Module.forward:
            yield from _with_forward(model.children())
        else:
            yield model


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yields the tensors in the output of a forward pass."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
    elif is_dataclass(output):
        yield from _tensors(vars(output))
