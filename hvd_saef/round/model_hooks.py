"""The hooks on `model=`: forward passes and state dicts see the right point by themselves. Local."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hvd_saef.round.modes import Modes


class ModelHooks:
    """The hooks on `model=`: a copy or a pickle of the model holds x, and its hooks are without effect."""

    def __init__(self, modes: Modes | None, on_load: Callable[[], None] = lambda: None) -> None:
        self._modes = modes
        self._on_load = on_load
        self._handles: list[Any] = []
        self._parameters: set[int] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._modes is not None:  # torch.save writes the tensors after it has seen all objects
            self._modes.visit_x()
        return ModelHooks, (None,)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelHooks:
        if self._modes is not None and self._modes.state is not None:
            self._modes.visit_x()
            with torch.no_grad():
                for slot in self._modes.state.layout.slots:
                    if id(slot.parameter) in memo:  # was copied before the hooks were, stepped ahead
                        memo[id(slot.parameter)].copy_(slot.parameter)
        return ModelHooks(None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # or the graph breaks at every copy
    def before_forward(self, module: nn.Module, args: Any) -> None:
        """Evaluation sees x, training the training point."""
        if self._modes is None:
            return
        if module.training:
            self._modes.leave_x()
        else:
            self._modes.visit_x(gradients=torch.is_grad_enabled())

    def before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """What is saved, or broadcast, is x."""
        if self._modes is not None:
            self._modes.visit_x()

    def after_load(self, module: nn.Module, incompatible: Any) -> None:
        """What is loaded is x."""
        if self._modes is not None:
            self._on_load()

    def attach(self, model: nn.Module, parameters: Iterable[Tensor]) -> None:
        """Register with a model, in place of earlier hooks for any of these parameters.

        An earlier optimizer leaves the parameters at its x, which is where a new one starts.
        """
        self._parameters = {id(parameter) for parameter in parameters}
        hooks = _of_models.setdefault(model, [])
        for earlier in [hook for hook in hooks if hook._parameters & self._parameters]:
            if earlier._modes is not None:
                earlier._modes.eval()
            for handle in earlier._handles:
                handle.remove()
            hooks.remove(earlier)
        hooks.append(self)
        self._handles = [
            model.register_forward_pre_hook(self.before_forward),
            *(
                part.register_state_dict_pre_hook(self.before_state_dict)  # type: ignore[no-untyped-call]
                for part in model.modules()  # model.encoder.state_dict(), or what torch.compile wrapped
            ),
            model.register_load_state_dict_post_hook(self.after_load),  # type: ignore[no-untyped-call]
        ]


_of_models: weakref.WeakKeyDictionary[nn.Module, list[ModelHooks]] = weakref.WeakKeyDictionary()


@contextmanager
def at_consensus(model: nn.Module) -> Iterator[None]:
    """Hold the parameters of all optimizers that were given this model at x, whatever its mode."""
    held = [hooks._modes for hooks in _of_models.get(model, []) if hooks._modes is not None]
    evaluating = [modes.evaluating for modes in held]
    for modes in held:
        modes.eval()
    try:
        yield
    finally:
        for modes, stays in zip(held, evaluating, strict=True):
            if not stays:
                modes.train()
