"""The order of things in a step, for one wrapped optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from hvd_saef.errors import ConsensusError, NonFiniteUpdateError
from hvd_saef.memory.layout import ChooseCompressor, Layout, averages_gradients, build_layout, takes_part
from hvd_saef.memory.progress import Progress
from hvd_saef.round.agreement import (
    Word,
    agree,
    check_configuration,
    check_consensus,
    check_workers,
    raise_broken,
    raise_failure,
    state_of,
)
from hvd_saef.round.averaging import average_errors, average_moments, whole_server_errors
from hvd_saef.round.determinism import check_compressors
from hvd_saef.round.exchange import Exchange
from hvd_saef.round.gradients import average_gradients, takes_sparse_only
from hvd_saef.round.guard import Guard
from hvd_saef.round.local_steps import LocalSteps
from hvd_saef.round.modes import Modes
from hvd_saef.round.origin import Origin
from hvd_saef.round.overflow import sums_fit
from hvd_saef.round.overlap import NoOverlap, Overlap
from hvd_saef.round.statistics import Statistics
from hvd_saef.settings import Settings, check_passes
from hvd_saef.transport.communicator import Channel, Communicator, in_use
from hvd_saef.transport.lines import Lease


class Session:
    """Everything that is ours about a wrapped optimizer. Methods are local unless they say collective."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        names: dict[Tensor, str],
        choose: ChooseCompressor,
        settings: Settings,
        passes: int,
        layout: Layout,
        communicator: Communicator,
        lease: Lease,
    ) -> None:
        """`communicator` talks on the line of the `lease`."""
        self.inner = inner
        self.names = names
        self.settings = settings
        self.passes = passes
        """Backward passes before a step; only overlap=True must know it."""
        self.layout = layout
        """The buckets of all parameters."""
        self.communicator = communicator
        self.statistics = Statistics()
        self.exchange = Exchange(communicator, lease.lines, settings, self.statistics)
        lease.used_by(communicator, self.exchange.under_way)
        self._lease = lease
        self.progress = Progress()
        self.modes = Modes(self.exchange, self.progress)
        self._choose = choose
        self._skip_synchronize = self._synchronized = False
        self.origin = Origin(communicator, settings, self.modes, self.progress)
        self.overlap = (
            Overlap(self.exchange, self.modes, inner, self.origin.is_agreed)
            if settings.overlap
            else NoOverlap()
        )
        self.before_exchange: list[Callable[[], None]] = []
        """Called by all workers between a round's last local step and its exchange; may be collective."""
        self._guard = Guard(self.modes)
        self._local = LocalSteps(self.exchange, self.modes, self.overlap, self._guard, inner)
        self.wants_to_stop = False
        """A signal came to this worker (:class:`hvd_saef.GracefulStop`): its next word says so."""
        self.stop_agreed = False
        """Some worker's word said so: all workers know it since the same step."""
        self._guard.claim(layout)

    # -- what there is ------------------------------------------------------------------------------

    @property
    def kept(self) -> Layout:
        """The buckets that have x and errors: none where gradients are averaged."""
        return Layout((), {}) if self.averages_gradients else self.layout

    @property
    def averages_gradients(self) -> bool:
        """Whether to do Horovod's arithmetic: nothing is compressed and nothing fed back."""
        return averages_gradients(self.settings, self.layout)

    @property
    def _facts(self) -> dict[str, Any]:
        """What ranks must have alike at a time, beside settings and parameters."""
        return {"backward_passes_per_step": self.passes}

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
        if not self._skip_synchronize and not self.overlap.under_way:
            if self._synchronized:
                warnings.warn(
                    "step() after synchronize() averages the gradients again: take it within "
                    "`with optimizer.skip_synchronize():`.",
                    stacklevel=3,
                )
            self._average()
            if self.averages_gradients and not sums_fit(self.layout):
                if self.settings.on_nonfinite == "raise":
                    raise NonFiniteUpdateError(
                        "the sum of all workers' gradients overflowed in float16. The step was not taken "
                        "anywhere. Use Compression.none, or on_nonfinite='skip' to skip such steps."
                    )
                self.statistics.skipped += 1
                return loss
        self._synchronized = False
        if not self._local.take(local_step, self.layout, self.averages_gradients):
            self.statistics.skipped += 1
            return loss
        self.progress.took_step()
        if self.progress.local_steps_done >= self.settings.local_steps:
            self._complete_round()
        self.modes.after_step()
        if self.progress.local_steps_done == self.settings.local_steps - 1:
            self.overlap.arm(local_step, self.passes)
        return loss

    def _prepare_gradients(self, scale: Tensor | None, overflow: Tensor | None) -> Word:
        """Unscale gradients, and say what is wrong with them."""
        held = sum(len(group["params"]) for group in self.inner.param_groups)
        if held != len(self.layout.slots) + len(self.layout.frozen):
            raise RuntimeError(
                "the wrapped optimizer's parameters changed behind the wrapper: call add_param_group of what "
                "hvd_saef.DistributedOptimizer returned."
            )
        self.take_in()
        self._local.prepare_sparse(self.layout, self.averages_gradients)
        return self._local.prepare(self.layout, scale, overflow)

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
        if self.wants_to_stop:
            word |= Word.STOP
        self.communicator.doing[Channel.WORDS] = f"round {self.progress.rounds + 1}"
        combined = agree(self.communicator, word, failure)
        self.stop_agreed |= Word.STOP in combined
        return combined

    def _decide(self, combined: Word, failure: Exception | None) -> None:
        if Word.FAILED in combined:
            raise_failure(self.communicator, failure)
        if Word.ANCHOR in combined:
            if Word.UNDER_WAY in combined:
                check_configuration(self.communicator, self.layout, self._facts)
                raise RuntimeError(
                    "a state was loaded between backward and step(), or on some ranks alone, and "
                    "overlap=True had sent updates already: load on all ranks, before the forward pass."
                )
            self.origin.settle(self.layout, self.kept, self._facts)
            self._begin()
            self._check_worker(
                "All ranks of a worker must hold the same state: call hvd.broadcast_optimizer_state, or load "
                "the same state on all of them."
            )
        if Word.NONFINITE in combined and self.settings.on_nonfinite == "raise":
            self._local.raise_nonfinite(self.layout)

    def _begin(self) -> None:
        """Where x, e and s come from was agreed on: nothing is expected, and payloads' sizes are."""
        self.overlap.disarm()
        try:
            self.exchange.agree_on_sizes(self.modes.state)
        except Exception:
            self.origin.unsettle()
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
            self._complete_round()

    def _complete_round(self) -> None:
        evaluating = self.modes.evaluating
        self.modes.train()
        failure = self._look()
        self.origin.whole_server_errors = None
        if self.modes.state is not None:
            self.exchange.complete_round(self.modes.state)
        self.overlap.disarm()
        if evaluating:
            self.modes.eval()
        self._end_round(failure)
        every = self.settings.check_consensus_every
        if every and self.progress.rounds % every == 0:
            with self.statistics.phase("agreement"):
                x = self.origin.x(self.layout)
                check_consensus(self.communicator, x, "Call optimizer.reanchor() to go on from rank 0's.")
                self._check_worker(
                    "Gradients are averaged over them, so something else changed on one: a learning rate, a "
                    "gradient between synchronize() and step(), or memory. Load a checkpoint."
                )

    def _look(self) -> Exception | None:
        """What those who look before the exchange raised."""
        try:
            for look in self.before_exchange:
                look()
        except Exception as failure:
            return failure
        return None

    def _end_round(self, failure: Exception | None) -> None:
        """Raise on all what was raised on any, within the exchange or by who looked. Collective."""
        if self.modes.state is None or not self.modes.state.buckets:
            return
        broken = self.exchange.take_failure()
        failure = broken or failure
        with self.statistics.phase("agreement"):
            combined = agree(self.communicator, Word.BROKEN if broken else Word.NOTHING, failure)
        if Word.BROKEN in combined:
            self.origin.broke()
            raise_broken(self.communicator, failure)
        if Word.FAILED in combined:
            raise_failure(self.communicator, failure)

    def _check_worker(self, advice: str) -> None:
        """Raise ConsensusError on all ranks if the ranks of a worker differ in its state. Collective."""
        own = {} if self.modes.state is None else self.modes.state.own()
        try:
            check_workers(self.communicator, own | state_of(self.inner, self.layout), advice)
        except ConsensusError:
            self.origin.unsettle()
            raise

    def check_process(self) -> None:
        """Raise RuntimeError in a process that was forked off, before it waits for anyone."""
        self._guard.check_process()

    def _check(self) -> None:
        self._guard.check(self.layout)
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
        if passes != self.passes:
            self.passes = passes
            self.origin.unsettle()

    def check_growth(self) -> None:
        """Raise RuntimeError where parameters cannot be added."""
        self.refuse_under_way("adding or unfreezing parameters")
        if self.progress.local_steps_done:
            raise RuntimeError("add_param_group between local steps: call flush() first.")

    def take_in(self) -> None:
        """Lay out the parameters that were frozen and now take part, if any; the next step agrees on it."""
        if any(takes_part(parameter) for _, parameter, _ in self.layout.frozen):
            self.grow()

    def grow(self) -> None:
        """Lay out the parameters that were added or unfrozen; once training began, after the others."""
        self.refuse_under_way("adding or unfreezing parameters")
        for i, group in enumerate(self.inner.param_groups):
            for j, parameter in enumerate(group["params"]):
                self.names.setdefault(parameter, f"noname.{i}.{j}")
        layout = build_layout(
            self.inner.param_groups,
            self.names,
            self._choose,
            self.settings,
            earlier=self.layout if self.modes.state else None,
        )
        if self.averages_gradients and not layout.dense:
            raise ValueError(
                "a compressed parameter was added to an optimizer that averages dense gradients."
            )
        check_compressors(layout, self.settings, self.communicator)
        self._guard.claim(layout)
        self.layout = layout
        self.origin.grow(self.kept)

    # -- synchronize, consolidate ---------------------------------------------------------------------

    @in_use
    def synchronize(self) -> None:
        """Horovod's: averages gradients where gradients are averaged (collective), else nothing."""
        if self.averages_gradients or self.communicator.node.size > 1:
            failure = self._hindrance("synchronize()")
            try:
                self._local.prepare_sparse(self.layout, self.averages_gradients)
            except Exception as error:
                failure = failure or error
            self._decide(self._tell(Word.NOTHING, failure), failure)
            self._average()
            self._synchronized = True

    def _average(self) -> None:
        """Average the gradients that are averaged: over the worker's ranks, over all workers. Collective."""
        as_sparse = takes_sparse_only(self.inner)
        if self.communicator.node.size > 1:
            self.exchange.means.average(self.layout, as_sparse, apart=self.settings.overlap)
        if self.averages_gradients:
            average_gradients(self.communicator, self.statistics, self.layout, as_sparse)

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Horovod's: step() inside does not average gradients again."""
        self._skip_synchronize = True
        try:
            yield
        finally:
            self._skip_synchronize = False

    @in_use
    def consolidate(self) -> None:
        """One averaging of errors and of the optimizer's state tensors, at a round's start. Collective."""
        self.flush()
        points = self.modes.points()
        if self.modes.state is not None:
            buckets = [bucket for bucket in self.modes.state.buckets if bucket.bucket.numel]
            average_errors(self.communicator, self.statistics, buckets)
            self.origin.whole_server_errors = whole_server_errors(self.communicator, self.modes.state)
            self.modes.to_start(points)
        average_moments(self.communicator, self.inner, self.layout)

    @in_use
    def reanchor(self) -> None:
        """Take x anew from rank 0's parameters, clear the errors, start a round there. Collective."""
        failure = self._hindrance("reanchor()", broken=True)
        if Word.FAILED in self._tell(Word.NOTHING, failure):
            raise_failure(self.communicator, failure)
        self.origin.renew(self.layout, self.kept, self._facts)
        self._begin()

    def stats(self) -> dict[str, float]:
        """See :func:`hvd_saef.DistributedOptimizer`."""
        e, s = (0.0, 0.0) if self.modes.state is None else self.modes.state.error_norms()
        return (
            {"rounds": self.progress.rounds}
            | self.statistics.as_dict()
            | {"error_norm": e, "server_error_norm": s}
        )
