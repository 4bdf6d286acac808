"""The local steps: gradients are checked before a step, parameters after it.

Either all workers take a local step, or none does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.errors import NonFiniteUpdateError
from hvd_saef.memory.layout import Layout
from hvd_saef.older_torch import note_step
from hvd_saef.round.agreement import Word, agree, raise_failure
from hvd_saef.round.exchange import Exchange
from hvd_saef.round.gradients import prepare_sparse, sparse_refused, values
from hvd_saef.round.guard import Guard
from hvd_saef.round.modes import Modes
from hvd_saef.round.overflow import StateCopy, look_at_gradients, who_holds
from hvd_saef.round.overlap import NoOverlap, Overlap


class LocalSteps:
    """Takes the local steps of one optimizer, `inner`. Methods are local unless they say collective."""

    def __init__(
        self,
        exchange: Exchange,
        modes: Modes,
        overlap: Overlap | NoOverlap,
        guard: Guard,
        inner: torch.optim.Optimizer,
    ) -> None:
        self._communicator = exchange.communicator
        self._settings = exchange.settings
        self._statistics = exchange.statistics
        self._modes = modes
        self._overlap = overlap
        self._guard = guard
        self._inner = inner
        self.keeps = False
        """True if gradients may overflow the optimizer's own state: :meth:`take` then keeps a copy of it."""

    def prepare_sparse(self, layout: Layout, averages_gradients: bool) -> None:
        """Makes sparse gradients dense with sparse_as_dense=True; else, or for SparseAdam, coalesces them.

        Raises TypeError for a sparse gradient that must be averaged without sparse_as_dense=True.
        """
        as_dense = self._settings.sparse_as_dense
        averaged = self._communicator.team.size > 1 or (averages_gradients and self._communicator.size > 1)
        for slot in layout.slots:
            gradient = slot.parameter.grad
            if gradient is None or not gradient.is_sparse:
                continue
            if averaged and not as_dense:
                raise sparse_refused(slot.name)
            prepare_sparse(slot.parameter, self._inner, as_dense)

    def prepare(self, layout: Layout, scale: Tensor | None, overflow: Tensor | None) -> Word:
        """Divides gradients by a GradScaler's `scale`, in place, and returns what is wrong with them.

        An `overflow` above 0 is the GradScaler's finding; the gradients are then left as they are.
        """
        if overflow is not None and overflow.item() > 0:
            return Word.OVERFLOW
        gradients = [values(parameter.grad) for parameter in self._late(layout) if parameter.grad is not None]
        if scale is not None:
            with torch.no_grad():
                for gradient in gradients:
                    gradient.div_(scale.to(gradient.device))
        if self._overlap.nonfinite:
            return Word.NONFINITE
        if not self._overlap.under_way:
            self._guard.check_gradients(gradients)
        return look_at_gradients(gradients)

    def raise_nonfinite(self, layout: Layout) -> None:
        """Raises NonFiniteUpdateError on all ranks, naming the gradients that are not finite. Collective."""
        gradients = {slot.name: slot.parameter.grad for slot in layout.slots}
        held = {name: values(gradient) for name, gradient in gradients.items() if gradient is not None}
        raise NonFiniteUpdateError(
            f"a gradient holds a NaN or an infinity: {who_holds(self._communicator, held)}. The step was not "
            "taken anywhere. Lower the learning rate, clip gradients, or pass on_nonfinite='skip' to skip "
            "such steps."
        )

    def take(self, local_step: Callable[[], None], layout: Layout, averages_gradients: bool) -> bool:
        """Takes the local step, and returns True if the step succeeded on all workers. Collective.

        Otherwise the parameters go back to the start of the round (except where gradients are averaged: no x
        is kept there), and the method raises. A rank that failed raises its own exception, the others
        WorkerError. For NaN, infinity and values near overflow all raise NonFiniteUpdateError; with
        on_nonfinite="skip" they return False instead, except where gradients are averaged.
        """
        failure, kept = None, None
        word = Word.UNDER_WAY if self._overlap.under_way else Word.NOTHING
        try:
            kept = StateCopy(self._inner) if self.keeps else None
            with self._statistics.phase("local_step", layout.devices[0]):
                self._overlap.finish(local_step)
            note_step(self._inner)
            fits = kernels.squares_fit(self._late(layout))
            if self._overlap.overflowed:
                fits = False
            if not fits or (kept and not kept.still_finite()):
                word |= Word.NONFINITE
        except Exception as error:  # raised again below, once all ranks know of it
            failure = error
        with self._statistics.phase("agreement"):
            combined = agree(self._communicator, word, failure)
        if not combined & (Word.FAILED | Word.NONFINITE):
            return True
        after = {slot.name: slot.parameter for slot in layout.slots}
        where = who_holds(self._communicator, after, much=True)
        if Word.UNDER_WAY in combined:
            self._overlap.abandon()
        self._modes.undo_local_steps()
        if kept:
            kept.put_back()
        if Word.FAILED in combined:
            raise_failure(self._communicator, failure)
        if self._settings.on_nonfinite == "skip" and not averages_gradients:
            return False
        touched = (
            "the optimizer's own state has taken the step" if kept is None else "so is the optimizer's own"
        )
        raise NonFiniteUpdateError(
            f"the local step made a number NaN, infinite, or nearly: {where or 'in its own state'}. "
            f"{'The errors' if averages_gradients else 'x and the errors'} are as before it; {touched}. "
            "Lower the learning rate."
        )

    def _late(self, layout: Layout) -> list[Tensor]:
        """Returns the parameters that did not take their local step during backward."""
        everything = [slot.parameter for slot in layout.slots]
        return [p for p in everything if not self._overlap.used(p)]
