"""Where the parameters are: at the point to train at (b, different on each worker) or at x. Local."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from hvd_saef.memory.layout import Layout
from hvd_saef.memory.progress import Progress
from hvd_saef.memory.state import State
from hvd_saef.round.exchange import Exchange


class Modes:
    """Moves the parameters of one optimizer between the training point and the consensus point x.

    Before x is taken (`state` is None) the parameters are x, and only the mode is remembered.
    """

    def __init__(self, exchange: Exchange, progress: Progress) -> None:
        self._exchange = exchange
        self._progress = progress
        self.state: State | None = None
        self.evaluating = False
        """The user called eval(): the parameters stay at x until train()."""
        self._visiting = False
        """A hook of the model brought the parameters to x; the next training forward brings them back."""
        self._gradients_at_x = False
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
            self._progress.undid_steps()
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
        self._progress.undid_steps()
        self.to_start()

    @torch.no_grad()
    def points(self) -> list[Tensor] | None:
        """Copies of the training point between local steps, a tensor a parameter; None at a round's start."""
        if self.state is None or self._progress.local_steps_done == 0:
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
