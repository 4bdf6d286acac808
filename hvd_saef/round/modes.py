"""Moves the parameters between x and the training point: first b, different on each worker. Local."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hvd_saef.memory.layout import Layout
from hvd_saef.memory.progress import Progress
from hvd_saef.memory.state import State
from hvd_saef.round.exchange import Exchange
from hvd_saef.round.owners import own
from hvd_saef.round.unstepped import (
    MOVED,
    MOVED_AT_X,
    NO_STEP,
    EarlySteps,
    GradientWatch,
    Unstepped,
    elsewhere,
)


class Modes:
    """Moves the parameters of one optimizer between the training point and the consensus point x.

    Before x is taken (`state` is None) the parameters are x, and only the mode is remembered. Whenever the
    parameters leave the training point, a copy of this point is kept, unless it is b.
    """

    def __init__(self, exchange: Exchange, progress: Progress) -> None:
        self._exchange = exchange
        self.progress = progress
        self.state: State | None = None
        self.evaluating = False
        """True after the user called eval(): the parameters stay at x until train()."""
        self._visiting = False
        """True after a hook of the model moved the parameters to x, until the next training forward."""
        self._gradients: GradientWatch | None = None
        """Watches for gradients while `_visiting` is True."""
        self._gradients_at_x = False
        self._reached: list[Tensor] | None = None
        """The training point while the parameters are at x; None if the training point is b."""
        self._stepping = False
        """True while a local step is being taken."""
        self.journeys = 0
        """The number of times that the parameters were written to move them to x or back."""
        self._unstepped: Unstepped | None = None
        self.early = EarlySteps()
        self._noted: list[int] | None = None
        """The version counters of the parameters when they were last known to be in the right place."""
        self._wrote = False  # True if other code had written when the parameters left the training point
        self._told: set[str] = set()
        self.taken: str | None = None
        """The name of a parameter that a later optimizer owns: this optimizer then moves no parameter."""

    @property
    def at_x(self) -> bool:
        """True if the parameters are at x."""
        return self.evaluating or self._visiting

    def eval(self) -> None:
        """Moves the parameters to x, where they stay until :meth:`train`."""
        if not self.at_x:
            self._to_x()
        self._end_visit()
        self.evaluating = True

    def train(self) -> None:
        """Moves the parameters to the training point."""
        if self.at_x:
            self._back()
        self._end_visit()
        self.evaluating = False

    def visit_x(self) -> None:
        """Moves the parameters to x, unless they are there already. For the hooks of the model."""
        if not self.at_x:
            self._to_x()
            self._visiting = True
            if self.state is not None and not self._x_is_shown(self.state):
                self._gradients = GradientWatch(self.state.layout.slots, self._on_gradient)
                self._gradients.start()

    def leave_x(self) -> None:
        """Moves the parameters to the training point, except after eval(). For the hooks of the model."""
        if not self.evaluating:
            self.train()

    def _on_gradient(self, parameter: Tensor) -> None:
        self._gradients_at_x = True

    def _end_visit(self) -> None:
        self._visiting = self._gradients_at_x = False
        if self._gradients is not None:
            self._gradients.stop()
            self._gradients = None

    def before_step(self) -> None:
        """Moves the parameters to the training point. Raises RuntimeError after eval()."""
        self.go_on("step() after eval()")
        self._exchange.wait_until_encoded()
        self.early.check(self.journeys)
        if MOVED not in self._told and self._noted != self._versions():
            self._tell_of_moves()

    def after_step(self) -> None:
        """Notes where the parameters are after a step that succeeded."""
        self.early.forget()
        self.note()

    def leave_early(self, parameters: Iterable[Tensor]) -> None:
        """Notes that these parameters take their local step during backward, within `early.step`."""
        self.early.leave(parameters, self.journeys)

    def go_on(self, what: str) -> None:
        """Moves the parameters to the training point. Raises RuntimeError, naming `what`, after eval()."""
        if self.evaluating:
            raise RuntimeError(
                f"{what}: the parameters are at the consensus point x, where SAEF does not train. Call "
                "optimizer.train() before the forward pass."
            )
        if self._visiting and self._gradients_at_x:
            warnings.warn(
                "the model was in eval mode during the forward pass before step(), or only parts of it were "
                "called since an evaluation or state_dict(), so its gradients were taken at the consensus "
                "point x: there is no step ahead in such steps. Call model.train() before a forward pass to "
                "train on; where parts are called, optimizer.train().",
                stacklevel=4,
            )
        self.leave_x()

    @contextmanager
    def local_step(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """The context of a local step: the user's step hooks may look at x before and after the step.

        Raises RuntimeError if a hook ends with eval(), or if the parameters are changed while they are at x.
        """

        def go_on(*_: object) -> None:
            self.go_on("a step hook that ended with optimizer.eval()")

        handle = optimizer.register_step_pre_hook(go_on)  # runs after all hooks of now
        self._stepping = True
        try:
            yield
            go_on()
        finally:
            self._stepping = False
            handle.remove()

    def begin_here(self, state: State) -> None:
        """Starts training on `state`, whose x was just taken from the parameters. No parameter is written.

        So an optimizer that differentiates gradients in its step can do so in the first step, too.
        """
        self._start(state)
        self.progress.undid_steps()
        self._reached = None
        self.note()

    def begin(self, state: State | None, training_point: list[Tensor] | None = None) -> None:
        """Starts training on `state`: from the start of a round, or from `training_point` within a round."""
        self._start(state)
        if training_point is None:
            self.progress.undid_steps()
        self.to_start(training_point)

    def _start(self, state: State | None) -> None:
        self.state, self._wrote = state, False
        if self._unstepped is not None:
            if state is None:
                self._unstepped.start()
            else:
                self._unstepped.stop()

    def claim(self, layout: Layout) -> None:
        """Makes this optimizer the owner. An earlier owner leaves its parameters at its x and is done."""
        own(self, layout)
        if self.state is None:
            self._unstepped = Unstepped(layout)

    def note(self) -> None:
        """Notes that the parameters are in the right place, whatever code moved them."""
        self._noted = self._versions()
        if self.state is None and self._unstepped is not None:
            self._unstepped.forget()

    @torch.no_grad()
    def grow(self, layout: Layout) -> list[Tensor]:
        """Adds the parameters of `layout` that are not in `state` yet, at their present values.

        Returns copies of these values; an empty list before x is taken.
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
    def to_start(self, training_point: list[Tensor] | None = None) -> None:
        """Writes the parameters after x, e or s changed: x in evaluation, else the training point.

        `training_point` is what :meth:`training_point` returned; None stands for b.
        """
        self._reached = None if training_point is None else [point.clone() for point in training_point]
        if self.state is None:
            return
        if self.at_x:
            self.state.show_x()
        else:
            self._show_training_point(self.state)

    @torch.no_grad()
    def let_go(self) -> None:
        """Writes x into the parameters at the training point, as the parameters will become the new x.

        A parameter that other code has written since then keeps its value.
        """
        if self.state is None or self.at_x:
            return
        self._exchange.wait_until_encoded()
        if self.progress.local_steps_done:
            noted = dict(zip(self._parameters(self.state), self._noted or [], strict=False))
            written = [p for p in self._parameters(self.state) if noted.get(p) != p._version]
        else:  # comparing values also finds a write that does not raise the version
            written = [slot.parameter for slot in elsewhere(self._exchange, self.state)]
        stays = [(parameter, parameter.clone()) for parameter in written]
        self.state.show_x()
        for parameter, value in stays:
            parameter.copy_(value)

    def undo_local_steps(self) -> None:
        """Moves the parameters back to the start of the round, and the count of local steps to 0."""
        self.progress.undid_steps()
        self.to_start()

    @torch.no_grad()
    def training_point(self) -> list[Tensor] | None:
        """Returns copies of the training point, one tensor per parameter; None for b, or if no x is taken."""
        if self.at_x:
            return None if self._reached is None else [tensor.clone() for tensor in self._reached]
        self._exchange.wait_until_encoded()
        moved = self._exchange.busy or self._tell_of_moves() is not None
        if self.state is None or (not moved and self.progress.local_steps_done == 0):
            return None
        return [parameter.clone() for parameter in self._parameters(self.state)]

    def was_written(self) -> bool:
        """Returns True if other code wrote to the parameters since :meth:`begin`, except by broadcasts."""
        return self._wrote or (not self.at_x and self._noted != self._versions())

    def _to_x(self) -> None:
        self._wrote = self.was_written()
        self._reached = self.training_point()
        if self.state is not None and not self._x_is_shown(self.state):
            self.state.show_x()
            self.journeys += 1

    def _x_is_shown(self, state: State) -> bool:
        """Returns True if the training point is x itself: moving then writes nothing."""
        return self._reached is None and not (state.settings.alpha or state.settings.beta)

    @torch.no_grad()
    def _back(self) -> None:
        """Moves the parameters from x to the training point."""
        if self.state is None or self._x_is_shown(self.state):
            return
        if not self.state.shows_x():
            if self.progress.local_steps_done == 0 and self._moved(self.state) is None:
                self._reached = None  # the user has restored the values replaced earlier
                return
            if self._stepping:
                raise RuntimeError(f"in the optimizer's step, {MOVED_AT_X}")
            self._tell(MOVED_AT_X)
        self._show_training_point(self.state)
        self.journeys += 1

    @torch.no_grad()
    def _show_training_point(self, state: State) -> None:
        if self._reached is None:
            self._exchange.show_start_points(state.buckets)
        elif self._reached:
            torch._foreach_copy_(self._parameters(state), self._reached)
        self._reached = None
        self.note()

    # -- changes of the parameters outside of steps -------------------------------------------------------

    @torch.no_grad()
    def _tell_of_moves(self) -> str | None:
        """Returns the name of the first parameter that was moved by something else than steps, or None.

        Warns once, except within a step. Returns None after local steps and early ones: those move all.
        """
        if self.state is None:
            moved = None if self._unstepped is None else self._unstepped.moved()
            if moved is not None:
                self._tell(NO_STEP, moved)
            return moved
        if self.progress.local_steps_done or self._exchange.busy:
            return None
        moved = self._moved(self.state)
        if moved is not None and not self._stepping:
            self._tell(MOVED, moved)
        return moved

    def _moved(self, state: State) -> str | None:
        """Returns the name of the first parameter that is not at b, or None."""
        return next((slot.name for slot in elsewhere(self._exchange, state)), None)

    def _tell(self, message: str, name: str = "") -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message.format(name=name), stacklevel=6)

    def _versions(self) -> list[int]:
        return [] if self.state is None else [p._version for p in self._parameters(self.state)]

    @staticmethod
    def _parameters(state: State) -> list[Tensor]:
        return [slot.parameter for slot in state.layout.slots]
