"""The order of things in a step, for one wrapped optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hvd_saef.memory.progress import Progress
from hvd_saef.round.agreement import (
    Word,
    agree,
    check_configuration,
    raise_failure,
)
from hvd_saef.round.averaging import average_errors, average_moments, whole_server_errors
from hvd_saef.round.exchange import Exchange
from hvd_saef.round.guard import Guard
from hvd_saef.round.local_steps import LocalSteps
from hvd_saef.round.modes import Modes
from hvd_saef.round.origin import Origin
from hvd_saef.round.overlap import NoOverlap, Overlap
from hvd_saef.round.parameters import Parameters
from hvd_saef.round.round_end import RoundEnd
from hvd_saef.round.statistics import Statistics
from hvd_saef.round.stopping import Stopping
from hvd_saef.round.synchronization import Synchronization
from hvd_saef.settings import Settings, check_passes
from hvd_saef.transport.communicator import Channel, Communicator, in_use
from hvd_saef.transport.lines import Lease


class Session:
    """Everything that is ours about a wrapped optimizer. Methods are local unless they say collective."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        parameters: Parameters,
        settings: Settings,
        passes: int,
        communicator: Communicator,
        lease: Lease,
    ) -> None:
        """`communicator` talks on the line of the `lease`; `passes` are backward passes before a step."""
        self.inner = inner
        self.parameters = parameters
        self.settings = settings
        self.communicator = communicator
        self.statistics = Statistics()
        self.exchange = Exchange(communicator, lease.lines, settings, self.statistics)
        lease.used_by(communicator, self.exchange.under_way)
        self._lease = lease
        self.progress = Progress()
        self.modes = Modes(self.exchange, self.progress)
        self.origin = Origin(communicator, settings, self.modes, self.progress)
        self.overlap = (
            Overlap(self.exchange, self.modes, inner, self.origin.is_agreed)
            if settings.overlap
            else NoOverlap()
        )
        self.stopping = Stopping()
        self._passes = passes
        self._guard = Guard(self.modes)
        self._local = LocalSteps(self.exchange, self.modes, self.overlap, self._guard, inner)
        self._synchronization = Synchronization(self.exchange, parameters, inner)
        self._round_end = RoundEnd(self.exchange, self.modes, self.origin, self.overlap, parameters, inner)
        self.before_exchange = self._round_end.before_exchange
        self._guard.claim(parameters.layout)

    @property
    def _facts(self) -> dict[str, Any]:
        """What ranks must have alike at a time, beside settings and parameters."""
        return {"backward_passes_per_step": self._passes}

    def use(self) -> AbstractContextManager[None]:
        """See :meth:`Communicator.use`: some ranks may have no part in a method's last collectives."""
        return self.communicator.use()

    # -- a step ---------------------------------------------------------------------------------------

    @in_use
    def step(
        self,
        local_step: Callable[[], None],
        closure: Callable[[], Any] | None,
        scale: Tensor | None,
        overflow: Tensor | None,
    ) -> Any:
        """One local step, and the exchange if it is the round's last. Collective.

        `scale` and `overflow` are a GradScaler's, or None.
        """
        self.check_process()  # before anything is computed: torch's threads are not in a forked process
        loss, failure, word = None, None, Word.NOTHING
        try:
            self._check()
            self.origin.check_whole()
            self.modes.before_step()
            self.overlap.check(closure, scale)
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
                self.modes.go_on("a closure of step() that ended with optimizer.eval()")
            word = self._prepare_gradients(scale, overflow)
        except Exception as error:  # raised again below, once everyone knows
            failure = error
        if self._agree(word, failure):
            self.statistics.skipped += 1
            return loss
        if not self.overlap.under_way and not self._synchronization.before_step():
            self.statistics.skipped += 1
            return loss
        self._synchronization.took_step()
        if not self._local.take(local_step, self.parameters.layout, self.parameters.averages_gradients):
            self.statistics.skipped += 1
            return loss
        self.progress.took_step()
        if self.progress.local_steps_done >= self.settings.local_steps:
            self._round_end.complete()
        self.modes.after_step()
        if self.progress.local_steps_done == self.settings.local_steps - 1:
            self.overlap.arm(local_step, self._passes)
        return loss

    def _prepare_gradients(self, scale: Tensor | None, overflow: Tensor | None) -> Word:
        """Unscale gradients, and say what is wrong with them."""
        self.parameters.check_complete()
        self.take_in()
        self._local.prepare_sparse(self.parameters.layout, self.parameters.averages_gradients)
        return self._local.prepare(self.parameters.layout, scale, overflow)

    def _agree(self, word: Word, failure: Exception | None) -> bool:
        """Whether all skip this step. Collective; takes x, e and s where a worker was new."""
        with self.statistics.phase("agreement"):
            combined = self._tell(word, failure)
            try:
                self._decide(combined, failure)
            except Exception:
                if Word.UNDER_WAY in combined:
                    self.overlap.abandon()
                raise
        self._local.keeps = Word.HUGE in combined
        return bool(combined & (Word.OVERFLOW | Word.NONFINITE))

    def _tell(self, word: Word, failure: Exception | None) -> Word:
        """Everyone's words, this rank's with what it has to say in any. Collective."""
        self.check_process()
        if not self.origin.agreed:
            word |= Word.ANCHOR
        if self.overlap.under_way:
            word |= Word.UNDER_WAY
        if self.stopping.wanted:
            word |= Word.STOP
        self.communicator.doing[Channel.WORDS] = f"round {self.progress.rounds + 1}"
        combined = agree(self.communicator, word, failure)
        self.stopping.heard(Word.STOP in combined)
        return combined

    def _decide(self, combined: Word, failure: Exception | None) -> None:
        if Word.FAILED in combined:
            raise_failure(self.communicator, failure)
        if Word.ANCHOR in combined:
            if Word.UNDER_WAY in combined:
                check_configuration(self.communicator, self.parameters.layout, self._facts)
                raise RuntimeError(
                    "a state was loaded between backward and step(), or on some ranks alone, and "
                    "overlap=True had sent updates already: load on all ranks, before the forward pass."
                )
            self.origin.agree(self.parameters.layout, self.parameters.with_state, self._facts)
            self._begin()
            self._round_end.check_worker(
                "All ranks of a worker must hold the same state: call hvd.broadcast_optimizer_state, or load "
                "the same state on all of them."
            )
        if Word.NONFINITE in combined and self.settings.on_nonfinite == "raise":
            self._local.raise_nonfinite(self.parameters.layout)

    def _begin(self) -> None:
        """Where x, e and s come from was agreed on: nothing is expected, and payloads' sizes are."""
        self.overlap.disarm()
        try:
            self.exchange.agree_on_sizes(self.modes.state)
        except Exception:
            self.origin.forget_agreement()
            raise

    def meet(self, what: str) -> None:
        """All ranks are about to do `what`: if it cannot be done on any, all raise, as before. Collective."""
        failure = self._hindrance(what)
        combined = self._tell(Word.NOTHING, failure)
        self._decide(combined, failure)  # a worker that was loaded since may be elsewhere in its round

    def _hindrance(self, what: str, broken: bool = False) -> Exception | None:
        """Why `what` cannot be done here; not since the exchange failed, if it mends what is `broken`."""
        try:
            self._check()
            if not broken:
                self.origin.check_whole()
            self.refuse_under_way(what)
            self.take_in()
        except Exception as failure:
            return failure
        return None

    @in_use
    def flush(self) -> None:
        """Complete the round now, if any local step was taken since the last. Collective."""
        self.meet("flush()")
        if self.progress.local_steps_done > 0:
            self._round_end.complete()

    def check_process(self) -> None:
        """Raise RuntimeError in a process that was forked off, before it waits for anyone."""
        self._guard.check_process()

    def _check(self) -> None:
        self._guard.check(self.parameters.layout)
        self.communicator.check()

    def refuse_under_way(self, what: str) -> None:
        """Raise RuntimeError where updates of a round have left that step() has not completed. Local."""
        if self.overlap.under_way:
            raise RuntimeError(
                f"{what} between backward and step(), when overlap=True had sent updates already: call "
                "step() first."
            )

    def set_passes(self, passes: int) -> None:
        """How many backward passes come before a step; the next step agrees on it."""
        self.refuse_under_way("set_backward_passes_per_step()")
        check_passes(passes)
        if passes != self._passes:
            self._passes = passes
            self.origin.forget_agreement()

    def check_growth(self) -> None:
        """Raise RuntimeError where parameters cannot be added."""
        self.refuse_under_way("adding or unfreezing parameters")
        if self.progress.local_steps_done:
            raise RuntimeError("add_param_group between local steps: call flush() first.")

    def take_in(self) -> None:
        """Lay out the parameters that were frozen and now take part, if any; the next step agrees on it."""
        if self.parameters.joining:
            self.grow()

    def grow(self) -> None:
        """Lay out the parameters that were added or unfrozen; once training began, after the others."""
        self.refuse_under_way("adding or unfreezing parameters")
        self.parameters.grow(self.modes.state is not None, self.communicator)
        self._guard.claim(self.parameters.layout)
        self.origin.grow(self.parameters.with_state)

    # -- synchronize, consolidate ---------------------------------------------------------------------

    @in_use
    def synchronize(self) -> None:
        """Horovod's: averages gradients where gradients are averaged (collective), else nothing."""
        if self._synchronization.needed:
            failure = self._hindrance("synchronize()")
            try:
                self._local.prepare_sparse(self.parameters.layout, self.parameters.averages_gradients)
            except Exception as error:
                failure = failure or error
            self._decide(self._tell(Word.NOTHING, failure), failure)
            self._synchronization.average()

    def skip_synchronize(self) -> AbstractContextManager[None]:
        """Horovod's: step() inside does not average gradients again."""
        return self._synchronization.skip()

    @in_use
    def consolidate(self) -> None:
        """One averaging of errors and of the optimizer's state tensors, at a round's start. Collective."""
        self.flush()
        points = self.modes.points()
        if self.modes.state is not None:
            buckets = [bucket for bucket in self.modes.state.buckets if bucket.bucket.numel]
            average_errors(self.communicator, self.statistics, buckets)
            self.origin.consolidated_with(whole_server_errors(self.communicator, self.modes.state))
            self.modes.to_start(points)
        average_moments(self.communicator, self.inner, self.parameters.layout)

    @in_use
    def reanchor(self) -> None:
        """Take x anew from rank 0's parameters, clear the errors, start a round there. Collective."""
        failure = self._hindrance("reanchor()", broken=True)
        if Word.FAILED in self._tell(Word.NOTHING, failure):
            raise_failure(self.communicator, failure)
        self.origin.renew(self.parameters.layout, self.parameters.with_state, self._facts)
        self._begin()

    def stats(self) -> dict[str, float]:
        """See :func:`hvd_saef.DistributedOptimizer`."""
        e, s = (0.0, 0.0) if self.modes.state is None else self.modes.state.error_norms()
        return (
            {"rounds": self.progress.rounds}
            | self.statistics.as_dict()
            | {"error_norm": e, "server_error_norm": s}
        )
