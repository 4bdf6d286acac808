"""The hooks on `model=`: forward passes and state dicts see the right point by themselves. Local."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvd_saef.round.modes import Modes, owners

MOVED_SINCE = (
    "the parameters were moved between a forward pass and its backward pass, which needs them as they were "
    "(autograd says 'modified by an inplace operation'): a forward pass in the other mode, a state_dict() "
    "or optimizer.eval() came between. Parameters are stepped ahead while training, and an evaluation moves "
    "them to the consensus point x. Evaluate before the forward pass that is trained on, or after backward()."
)


class ModelHooks:
    """The hooks on `model=`: a copy or a pickle of the model holds x, and its hooks are without effect."""

    def __init__(self, modes: Modes | None, on_load: Callable[[], None] = lambda: None) -> None:
        self._modes = modes
        self._on_load = on_load
        self._handles: list[Any] = []
        self._loading: nn.Module | None = None
        self._missing: list[str] | None = None
        """The outermost module of the load that is under way, and the load's own list of missing keys."""

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
            self._modes.visit_x()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Let the backward pass, if one comes, begin with a look at where the parameters are by then."""
        if self._modes is None or not torch.is_grad_enabled():
            return
        look = _LookBack(self._modes)
        for tensor in _tensors(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(look)

    def before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """What is saved, or broadcast, is x."""
        if self._modes is not None:
            self._modes.visit_x()

    def before_load(
        self, module: nn.Module, state: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *_: Any
    ) -> None:
        """What is loaded is x, and so is what a partial state leaves as it is."""
        if self._modes is not None:
            self._modes.visit_x()
            if missing is not self._missing:  # each load has a list of its own
                self._loading, self._missing = module, missing

    def after_load(self, module: nn.Module, incompatible: Any) -> None:
        """What is loaded is x: once for all parts that are loaded together."""
        if self._modes is not None and self._loading in (None, module):
            self._loading = self._missing = None
            self._on_load()
            self._modes.note()

    def attach(self, models: Sequence[nn.Module]) -> None:
        """Register with models, and throw out the hooks of optimizers that have given up."""
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
        for part in parts.values():  # model.encoder.state_dict(), or what torch.compile wrapped
            self._handles += [
                part.register_state_dict_pre_hook(self.before_state_dict),  # type: ignore[no-untyped-call]
                part.register_load_state_dict_pre_hook(self.before_load),  # type: ignore[no-untyped-call]
                part.register_load_state_dict_post_hook(self.after_load),  # type: ignore[no-untyped-call]
            ]


_of_models: weakref.WeakKeyDictionary[nn.Module, list[ModelHooks]] = weakref.WeakKeyDictionary()


class _LookBack:
    """Called when the backward pass of one forward pass begins, before it uses any parameter."""

    def __init__(self, modes: Modes) -> None:
        self._modes = weakref.ref(modes)  # the graph may live longer
        self._journeys = modes.journeys

    def __call__(self, gradients: Any) -> None:
        modes = self._modes()
        if modes is not None and modes.journeys != self._journeys:
            raise RuntimeError(MOVED_SINCE)


def _with_forward(models: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules that can be called; of containers without a forward of their own, what they hold."""
    for model in models:
        if getattr(model.forward, "__func__", None) is nn.Module.forward:
            yield from _with_forward(model.children())
        else:
            yield model


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a forward pass gave."""
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


@contextmanager
def at_consensus(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Hold all parameters of all optimizers that have any of these at x."""
    held = owners(parameters)
    evaluating = [modes.evaluating for modes in held]
    for modes in held:
        modes.eval()
    try:
        yield
    finally:
        for modes, stays in zip(held, evaluating, strict=True):
            if not stays:
                modes.train()
