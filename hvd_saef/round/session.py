"""The order of a step of one wrapped optimizer, and of the other calls that concern all its parts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hvd_saef.memory.progress import Progress
from hvd_saef.round.agreement import (
    BUCKETS,
    Word,
    agree,
    check_configuration,
    raise_failure,
)
from hvd_saef.round.averaging import average_errors, average_moments, whole_server_errors
from hvd_saef.round.capture import refuse_capture
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
    """Holds all parts that the library adds to a torch optimizer, and calls them in the right order.

    Methods are local unless they say collective.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        parameters: Parameters,
        settings: Settings,
        passes: int,
        communicator: Communicator,
        lease: Lease,
    ) -> None:
        """Use `communicator` on the line of the `lease`; expect `passes` backward passes before a step."""
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
        """The facts that must be equal on all ranks, beside settings and parameters, and may change."""
        buckets = [bucket.numel for bucket in self.parameters.layout.buckets]
        return {"backward_passes_per_step": self._passes, BUCKETS: buckets}

    def use(self) -> AbstractContextManager[None]:
        """Returns a context within which MPI does not end: see :meth:`Communicator.use`.

        A rank that has no part in a method's last collectives could otherwise end MPI under the others.
        """
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
        """Takes one local step, and does the exchange if the step is the round's last. Collective.

        Returns what `closure` returns, or None. `scale` and `overflow` are a GradScaler's, or None.
        """
        self.check_process()  # first of all, as a forked process lacks torch's threads and may not compute
        loss, failure, word = None, None, Word.NOTHING
        try:
            self._check("step()")
            self.origin.check_whole()
            self.modes.before_step()
            self.overlap.check(closure, scale)
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
                self.modes.go_on("a closure of step() that ended with optimizer.eval()")
            word = self._prepare_gradients(scale, overflow)
        except Exception as error:  # raised again below, once all ranks know of it
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
        """Unscales the gradients, in place, and returns what is wrong with them."""
        self.parameters.check_complete()
        self.take_in()
        self._local.prepare_sparse(self.parameters.layout, self.parameters.averages_gradients)
        return self._local.prepare(self.parameters.layout, scale, overflow)

    def _agree(self, word: Word, failure: Exception | None) -> bool:
        """Returns True if all ranks skip this step. Collective; takes x, e and s if any rank was new."""
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
        """Returns the bitwise or of all ranks' words. Collective.

        This rank's word is `word` and the facts that every word reports (new, under way, asked to stop).
        """
        self.check_process()
        if not self.origin.is_agreed():
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
                "All ranks of a worker must hold the same state: call hvd.broadcast_optimizer_state, seed "
                "them alike, or load the same state on all of them."
            )
        if Word.NONFINITE in combined and self.settings.on_nonfinite == "raise":
            self._local.raise_nonfinite(self.parameters.layout)

    def _begin(self) -> None:
        """Expects no early gradients, and agrees on the payloads' sizes, for new x, e and s. Collective."""
        self.overlap.disarm()
        try:
            self.exchange.agree_on_sizes(self.modes.state)
        except Exception:
            self.origin.forget_agreement()
            raise

    def meet(self, what: str) -> None:
        """Raises on all ranks, before any change, if any rank cannot do `what` now. Collective.

        Otherwise takes x, e and s if any rank was new.
        """
        failure = self._hindrance(what)
        combined = self._tell(Word.NOTHING, failure)
        self._decide(combined, failure)  # a worker with a newly loaded state may be elsewhere in its round

    def _hindrance(self, what: str, broken: bool = False) -> Exception | None:
        """Returns the exception that forbids `what` on this rank, or None. Lays out joining parameters.

        An earlier failed exchange forbids it too, unless `broken`: `what` mends such a failure.
        """
        try:
            self._check(what)
            if not broken:
                self.origin.check_whole()
            self.refuse_under_way(what)
            self.take_in()
        except Exception as failure:
            return failure
        return None

    @in_use
    def flush(self) -> None:
        """Completes the round now, if any local step was taken since the last round. Collective."""
        self.meet("flush()")
        if self.progress.local_steps_done > 0:
            self._round_end.complete()

    def check_process(self) -> None:
        """Raises RuntimeError in a forked child process, before it waits for other ranks."""
        self._guard.check_process()

    def _check(self, what: str) -> None:
        refuse_capture(self.parameters.layout.devices, what)
        self._guard.check(self.parameters.layout)
        self.communicator.check()

    def refuse_under_way(self, what: str) -> None:
        """Raises RuntimeError if updates were sent early and step() has not completed their round. Local."""
        if self.overlap.under_way:
            raise RuntimeError(
                f"{what} between backward and step(), when overlap=True had sent updates already: call "
                "step() first."
            )

    def set_passes(self, passes: int) -> None:
        """Sets the number of backward passes before a step; all ranks agree on it in the next step."""
        self.refuse_under_way("set_backward_passes_per_step()")
        check_passes(passes)
        if passes != self._passes:
            self._passes = passes
            self.origin.forget_agreement()

    def check_growth(self) -> None:
        """Raises RuntimeError if parameters cannot be added now."""
        self.refuse_under_way("adding or unfreezing parameters")
        if self.progress.local_steps_done:
            raise RuntimeError("add_param_group between local steps: call flush() first.")

    def take_in(self) -> None:
        """Lays out the parameters that were frozen and now take part; the next step agrees on the layout."""
        if self.parameters.joining:
            self.grow()

    def grow(self) -> None:
        """Lays out the parameters that were added or unfrozen: after the others, once training began."""
        self.refuse_under_way("adding or unfreezing parameters")
        self.parameters.grow(self.modes.state is not None, self.communicator)
        self._guard.claim(self.parameters.layout)
        self.origin.grow(self.parameters.with_state)

    # -- synchronize, consolidate ---------------------------------------------------------------------

    @in_use
    def synchronize(self) -> None:
        """Averages gradients now, as Horovod's method does, if they are averaged at all. Collective then."""
        if self._synchronization.needed:
            failure = self._hindrance("synchronize()")
            try:
                self._local.prepare_sparse(self.parameters.layout, self.parameters.averages_gradients)
            except Exception as error:
                failure = failure or error
            self._decide(self._tell(Word.NOTHING, failure), failure)
            self._synchronization.average()

    def skip_synchronize(self) -> AbstractContextManager[None]:
        """Returns Horovod's context, inside which step() does not average gradients again."""
        return self._synchronization.skip()

    @in_use
    def consolidate(self) -> None:
        """Completes the round, then averages e and the optimizer's moments over the workers. Collective.

        Gathers all of s on every worker, too.
        """
        self.flush()
        training_point = self.modes.training_point()
        if self.modes.state is not None:
            buckets = [bucket for bucket in self.modes.state.buckets if bucket.bucket.numel]
            average_errors(self.communicator, self.statistics, buckets)
            self.origin.consolidated_with(whole_server_errors(self.communicator, self.modes.state))
            self.modes.to_start(training_point)
        average_moments(self.communicator, self.inner, self.parameters.layout)

    @in_use
    def reanchor(self) -> None:
        """Takes x from rank 0's parameters, clears e and s, and begins a round from this x. Collective."""
        failure = self._hindrance("reanchor()", broken=True)
        if Word.FAILED in self._tell(Word.NOTHING, failure):
            raise_failure(self.communicator, failure)
        self.origin.renew(self.parameters.layout, self.parameters.with_state, self._facts)
        self._begin()

    def stats(self) -> dict[str, float]:
        """Returns the numbers that :func:`hvd_saef.DistributedOptimizer` describes."""
        e, s = (0.0, 0.0) if self.modes.state is None else self.modes.state.error_norms()
        return (
            {"rounds": self.progress.rounds}
            | self.statistics.as_dict()
            | {"error_norm": e, "server_error_norm": s}
        )
