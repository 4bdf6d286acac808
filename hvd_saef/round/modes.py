"""Where the parameters are: at the point to train at (b, different on each worker) or at x. Local."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hvd_saef.memory.layout import Layout
from hvd_saef.memory.state import State
from hvd_saef.round.exchange import Exchange


class Modes:
    """Moves the parameters of one optimizer between the training point and the consensus point x.

    Before x is taken (`state` is None) the parameters are x, and only the mode is remembered.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.state: State | None = None
        self.evaluating = False
        """The user called eval(): the parameters stay at x until train()."""
        self._visiting = False
        """A hook of the model brought the parameters to x; the next training forward brings them back."""
        self._gradients_at_x = False
        self.local_steps_done = 0
        """Local steps since the round began; above 0 the training point is the one reached, not b."""
        self._reached: list[Tensor] | None = None

    @property
    def at_x(self) -> bool:
        """Whether the parameters are at x."""
        return self.evaluating or self._visiting

    def eval(self) -> None:
        """Move the parameters to x."""
        if not self.at_x:
            self._to_x()
        self.evaluating, self._visiting = True, False

    def train(self) -> None:
        """Move the parameters to the training point."""
        if self.at_x:
            self._to_training_point()
        self.evaluating = self._visiting = False

    def visit_x(self, gradients: bool = False) -> None:
        """For the model's hooks: move to x unless there; `gradients` if a backward pass may follow."""
        if not self.at_x:
            self._to_x()
            self._visiting = True
        self._gradients_at_x |= gradients

    def leave_x(self) -> None:
        """For the model's hooks: move back, unless the user said eval()."""
        if self._visiting:
            self._to_training_point()
        self._visiting = self._gradients_at_x = False

    def before_step(self) -> None:
        """Bring the parameters to the training point. Raises RuntimeError after eval()."""
        if self.evaluating:
            raise RuntimeError(
                "step() after eval(): the parameters are at the consensus point x, where SAEF does not "
                "train. Call optimizer.train() before the forward pass."
            )
        if self._visiting and self._gradients_at_x:
            warnings.warn(
                "the model was in eval mode during the forward pass before step(), so its gradients were "
                "taken at the consensus point x: there is no step ahead in such steps. "
                "Call model.train() before a forward pass to train on.",
                stacklevel=4,
            )
        self.leave_x()

    def begin(self, state: State | None, points: list[Tensor] | None = None) -> None:
        """Train on `state` from a round's start, or from `points` within one."""
        self.state = state
        if points is None:
            self.local_steps_done = 0
        self.to_start(points)

    @torch.no_grad()
    def grow(self, layout: Layout) -> list[Tensor]:
        """Take up the parameters that `layout` has beyond the ones here, at their present values.

        Returns copies of these.
        """
        if self.state is None:
            return []
        known = len(self._parameters(self.state))
        self.state.grow(layout)
        added = [parameter.clone() for parameter in self._parameters(self.state)[known:]]
        if self._reached is not None:
            self._reached += added
        return added

    @torch.no_grad()
    def to_start(self, points: list[Tensor] | None = None) -> None:
        """x, e or s changed: put the parameters where they belong now.

        `points` is what :meth:`points` once gave, for a training point between local steps.
        """
        self._reached = None if points is None else [point.clone() for point in points]
        if self.state is not None and self.at_x:
            self.state.show_x()
        else:
            self._to_training_point()

    def undo_local_steps(self) -> None:
        """Put the parameters back to where the round began."""
        self.local_steps_done = 0
        self.to_start()

    @torch.no_grad()
    def points(self) -> list[Tensor] | None:
        """Copies of the training point between local steps, a tensor a parameter; None at a round's start."""
        if self.state is None or self.local_steps_done == 0:
            return None
        source = self._reached if self._reached is not None else self._parameters(self.state)
        return [tensor.clone() for tensor in source]

    def _to_x(self) -> None:
        if self.state is None:
            return
        self._exchange.wait_until_encoded()
        self._reached = self.points()
        self.state.show_x()

    @torch.no_grad()
    def _to_training_point(self) -> None:
        if self.state is None:
            return
        if self._reached is None:
            self._exchange.show_start_points(self.state.buckets)
        else:
            if self._reached:
                torch._foreach_copy_(self._parameters(self.state), self._reached)
            self._reached = None

    @staticmethod
    def _parameters(state: State) -> list[Tensor]:
        return [slot.parameter for slot in state.layout.slots]


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
