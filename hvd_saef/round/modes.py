"""Where the parameters are: at the point to train at (b, different on each worker) or at x. Local."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hvd_saef.memory.layout import Layout
from hvd_saef.memory.progress import Progress
from hvd_saef.memory.state import State
from hvd_saef.round.exchange import Exchange
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

    Before x is taken (`state` is None) the parameters are x, and only the mode is remembered. Whenever they
    leave the training point, it is kept unless it is b, whoever looks and whatever brought them there.
    """

    def __init__(self, exchange: Exchange, progress: Progress) -> None:
        self._exchange = exchange
        self.progress = progress
        self.state: State | None = None
        self.evaluating = False
        """The user called eval(): the parameters stay at x until train()."""
        self._visiting = False
        """A hook of the model brought the parameters to x; the next training forward brings them back."""
        self._gradients: GradientWatch | None = None
        """Watches for gradients during such a visit."""
        self._gradients_at_x = False
        self._reached: list[Tensor] | None = None
        """At x, the training point unless it is b."""
        self._stepping = False
        """A local step is being taken."""
        self.journeys = 0
        """How often the parameters were written to go to x, or back."""
        self._unstepped: Unstepped | None = None
        self.early = EarlySteps()
        self._noted: list[int] | None = None
        """The parameters' versions when they were last where they belong."""
        self._told: set[str] = set()
        self.taken: str | None = None
        """The name of a parameter that a later optimizer has: then nothing here moves any more."""

    @property
    def at_x(self) -> bool:
        """Whether the parameters are at x."""
        return self.evaluating or self._visiting

    def eval(self) -> None:
        """Move the parameters to x."""
        if not self.at_x:
            self._to_x()
        self._end_visit()
        self.evaluating = True

    def train(self) -> None:
        """Move the parameters to the training point."""
        if self.at_x:
            self._back()
        self._end_visit()
        self.evaluating = False

    def visit_x(self) -> None:
        """For the model's hooks: move to x unless there."""
        if not self.at_x:
            self._to_x()
            self._visiting = True
            if self.state is not None and not self._x_is_shown(self.state):
                self._gradients = GradientWatch(self.state.layout.slots, self._on_gradient)
                self._gradients.start()

    def leave_x(self) -> None:
        """For the model's hooks: move back, unless the user said eval()."""
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
        """Bring the parameters to the training point. Raises RuntimeError after eval()."""
        self.go_on("step() after eval()")
        self._exchange.wait_until_encoded()
        self.early.check(self.journeys)
        if MOVED not in self._told and self._noted != self._versions():
            self._tell_of_moves()

    def after_step(self) -> None:
        """A step went well."""
        self.early.forget()
        self.note()

    def leave_early(self, parameters: Iterable[Tensor]) -> None:
        """These take their local step during backward, within `early.step`."""
        self.early.leave(parameters, self.journeys)

    def go_on(self, what: str) -> None:
        """Bring the parameters to the training point. Raises RuntimeError, naming `what`, after eval()."""
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
        """Around a local step: hooks of users' may look at x before it and after it.

        Raises RuntimeError if one of them ends with eval(), or if parameters move while they are at x.
        """

        def go_on(*_: object) -> None:
            self.go_on("a step hook that ended with optimizer.eval()")

        handle = optimizer.register_step_pre_hook(go_on)  # the last of all that there are by now
        self._stepping = True
        try:
            yield
            go_on()
        finally:
            self._stepping = False
            handle.remove()

    def begin(self, state: State | None, points: list[Tensor] | None = None) -> None:
        """Train on `state` from a round's start, or from `points` within one."""
        self.state = state
        if self._unstepped is not None:
            if state is None:
                self._unstepped.start()
            else:
                self._unstepped.stop()
        if points is None:
            self.progress.undid_steps()
        self.to_start(points)

    def claim(self, layout: Layout) -> None:
        """These parameters are ours now; whoever had one of them before is done, and leaves it at its x."""
        for slot in layout.slots:
            earlier = _of_parameters.get(id(slot.parameter))
            if earlier is not None and earlier is not self and earlier.taken is None:
                earlier.eval()
                earlier.taken, earlier.state = slot.name, None
        for slot in layout.slots:
            _of_parameters[id(slot.parameter)] = self
        if self.state is None:
            self._unstepped = Unstepped(layout)

    def note(self) -> None:
        """The parameters are where they belong, whatever moved them."""
        self._noted = self._versions()
        if self.state is None and self._unstepped is not None:
            self._unstepped.forget()

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

        `points` is what :meth:`points` once gave, for a training point that is not b.
        """
        self._reached = None if points is None else [point.clone() for point in points]
        if self.state is None:
            return
        if self.at_x:
            self.state.show_x()
        else:
            self._show_training_point(self.state)

    @torch.no_grad()
    def let_go(self) -> None:
        """The parameters will be taken for x: those that are where training left them go to the x there is.

        What someone else has written into a parameter since then stays.
        """
        if self.state is None or self.at_x:
            return
        self._exchange.wait_until_encoded()
        if self.progress.local_steps_done:
            noted = dict(zip(self._parameters(self.state), self._noted or [], strict=False))
            written = [p for p in self._parameters(self.state) if noted.get(p) != p._version]
        else:  # whoever writes without raising the version is seen, too
            written = [slot.parameter for slot in elsewhere(self._exchange, self.state)]
        stays = [(parameter, parameter.clone()) for parameter in written]
        self.state.show_x()
        for parameter, value in stays:
            parameter.copy_(value)

    def undo_local_steps(self) -> None:
        """Put the parameters back to where the round began."""
        self.progress.undid_steps()
        self.to_start()

    @torch.no_grad()
    def points(self) -> list[Tensor] | None:
        """Copies of the training point, a tensor a parameter; None where it is b, at a round's start."""
        if self.at_x:
            return None if self._reached is None else [tensor.clone() for tensor in self._reached]
        self._exchange.wait_until_encoded()
        moved = self._tell_of_moves()
        if self.state is None or (moved is None and self.progress.local_steps_done == 0):
            return None
        return [parameter.clone() for parameter in self._parameters(self.state)]

    def _to_x(self) -> None:
        self._reached = self.points()
        if self.state is not None and not self._x_is_shown(self.state):
            self.state.show_x()
            self.journeys += 1

    def _x_is_shown(self, state: State) -> bool:
        """Whether the training point is x itself: then nothing is written on the way there and back."""
        return self._reached is None and not (state.settings.alpha or state.settings.beta)

    @torch.no_grad()
    def _back(self) -> None:
        """From x to the training point."""
        if self.state is None or self._x_is_shown(self.state):
            return
        if not self.state.shows_x():
            if self.progress.local_steps_done == 0 and self._moved(self.state) is None:
                self._reached = None  # someone has put back what he had replaced before
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

    # -- what moves the parameters beside steps -----------------------------------------------------------

    @torch.no_grad()
    def _tell_of_moves(self) -> str | None:
        """The name of the first parameter that is elsewhere than at b, or moved without any step.

        Say so once, unless this is what local steps do.
        """
        if self.state is None:
            moved = None if self._unstepped is None else self._unstepped.moved()
            if moved is not None:
                self._tell(NO_STEP, moved)
            return moved
        if self.progress.local_steps_done:
            return None
        moved = self._moved(self.state)
        if moved is not None and not self._stepping and not self._exchange.busy:
            self._tell(MOVED, moved)
        return moved

    def _moved(self, state: State) -> str | None:
        """The name of the first parameter that is not at b."""
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


# By parameter: whoever has one keeps it alive, so that its id is its own.
_of_parameters: weakref.WeakValueDictionary[int, Modes] = weakref.WeakValueDictionary()


def owners(parameters: Iterable[Tensor]) -> list[Modes]:
    """Those of all optimizers that have any of these parameters."""
    found = (_of_parameters.get(id(parameter)) for parameter in parameters)
    return list({id(modes): modes for modes in found if modes is not None}.values())
