"""The local steps: gradients are looked at before, numbers after. All workers take one, or none does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.errors import NonFiniteUpdateError
from hvd_saef.memory.layout import Layout
from hvd_saef.round.agreement import Word, agree, raise_failure
from hvd_saef.round.exchange import Exchange
from hvd_saef.round.gradients import prepare_sparse, sparse_refused, values
from hvd_saef.round.guard import Guard
from hvd_saef.round.modes import Modes
from hvd_saef.round.overflow import StateCopy, look_at_gradients, who_holds
from hvd_saef.round.overlap import NoOverlap, Overlap


class LocalSteps:
    """Those of one wrapped optimizer, `inner`. Methods are local unless they say collective."""

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
        """Whether gradients may overflow the optimizer's own state, so that a copy is kept while it steps."""

    def prepare_sparse(self, layout: Layout, averages_gradients: bool) -> None:
        """Make sparse gradients dense where that is wanted; refuse them where it would be needed."""
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
        """Unscale gradients by a GradScaler's `scale`, and say what is wrong with them."""
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
        """Raise NonFiniteUpdateError, for a gradient that some worker found. Collective."""
        gradients = {slot.name: slot.parameter.grad for slot in layout.slots}
        held = {name: values(gradient) for name, gradient in gradients.items() if gradient is not None}
        raise NonFiniteUpdateError(
            f"a gradient holds a NaN or an infinity: {who_holds(self._communicator, held)}. The step was not "
            "taken anywhere. Lower the learning rate, clip gradients, or pass on_nonfinite='skip' to skip "
            "such steps."
        )

    def take(self, local_step: Callable[[], None], layout: Layout, averages_gradients: bool) -> bool:
        """Whether it went well on all workers: else the parameters are where the round began. Collective."""
        failure, kept = None, None
        word = Word.UNDER_WAY if self._overlap.under_way else Word.NOTHING
        try:
            kept = StateCopy(self._inner) if self.keeps else None
            with self._statistics.phase("local_step"):
                self._overlap.finish(local_step)
            # A scheduler that was made before wrapping watches the inner optimizer for steps.
            vars(self._inner)["_opt_called"] = True
            fits = kernels.squares_fit(self._late(layout))
            if self._overlap.overflowed:
                fits = False
            if not fits or (kept and not kept.still_finite()):
                word |= Word.NONFINITE
        except Exception as error:  # raised again below, once everyone knows
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
        """The parameters that have not taken their step during backward."""
        everything = [slot.parameter for slot in layout.slots]
        return [p for p in everything if not self._overlap.used(p)]
