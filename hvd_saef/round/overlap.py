"""`overlap=True`: buckets step and leave while backward still computes the gradients of others. Collective.

The thread that computes gradients only notes which buckets are complete. Another thread checks a bucket's
gradients, takes the bucket's local step and encodes it, bucket by bucket. An exception there is noted, and
step() raises it, since the other workers expect the bucket. The payloads are under way when step() begins; x
and the parameters of the next round are written in step() alone, once all workers have agreed. All workers
send their buckets in the same order, the last one first. Where a worker has several ranks, a bucket's
gradients are first averaged over the team, in the background as well.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.memory.layout import takes_part
from hvd_saef.memory.state import BucketState
from hvd_saef.older_torch import raise_versions
from hvd_saef.round.armed import Armed
from hvd_saef.round.capture import refuse_capture
from hvd_saef.round.exchange import Exchange
from hvd_saef.round.gradients import prepare_sparse, sparse_refused, takes_sparse_only
from hvd_saef.round.modes import Modes
from hvd_saef.round.partial_steps import LocalStep, StepCode, remove_hooks, step_elsewhere, step_here
from hvd_saef.round.team_means import TeamMean


class NoOverlap:
    """Stands in for :class:`Overlap` with overlap=False: everything happens in step(). Local."""

    under_way = nonfinite = overflowed = False

    def arm(self, local_step: LocalStep, passes: int) -> None:
        """Does nothing, since no bucket leaves early."""

    def disarm(self) -> None:
        """Does nothing, since no gradient was expected."""

    def used(self, parameter: Tensor) -> bool:
        """Returns False: no parameter takes its local step before step()."""
        return False

    def check(self, closure: object, scale: object) -> None:
        """Does nothing: any closure and any GradScaler are allowed without overlap."""

    def finish(self, local_step: LocalStep) -> None:
        """Takes the local step of all parameters."""
        local_step()

    def abandon(self) -> None:
        """Does nothing, since no bucket was sent."""


class Overlap:
    """Watches the parameters of one optimizer for the gradients of a round's last local step."""

    def __init__(
        self, exchange: Exchange, modes: Modes, inner: torch.optim.Optimizer, settled: Callable[[], bool]
    ) -> None:
        """Use `settled` to ask if all workers agree where x, e and s come from; before, no bucket leaves."""
        self._exchange = exchange
        self._modes = modes
        self._inner = inner
        self._settled = settled
        self._warned = self._told_of_hooks = False
        self._step_code = StepCode(inner)
        self._armed: Armed | None = None
        self._handles: dict[Tensor, Any] = {}
        weakref.finalize(self, remove_hooks, self._handles.values())

    @property
    def under_way(self) -> bool:
        """True if any bucket has left in this round. Local."""
        return self._exchange.busy or (self._armed is not None and bool(self._armed.means))

    @property
    def nonfinite(self) -> bool:
        """True if a gradient that was used early held NaN or infinity. Local."""
        return self._armed is not None and self._armed.nonfinite

    @property
    def overflowed(self) -> bool:
        """True if a gradient or a mean is not finite, or an early local step came near overflow. Local."""
        return self._armed is not None and (self._armed.overflowed or self._armed.nonfinite)

    def arm(self, local_step: LocalStep, passes: int) -> None:
        """Expects the gradients of a round's last local step: `passes` for each parameter. Local."""
        state = self._modes.state
        if state is None:
            return
        armed = self._armed = Armed(state, local_step, passes, deque())
        order = self._exchange.order(state)
        if any(self._exchange.held(state, bucket_state) for bucket_state in order):
            self._warn_of_held()
        for bucket_state in order:
            trained = [p for p in bucket_state.bucket.parameters if p.requires_grad]
            armed.expected.append((bucket_state, dict.fromkeys(trained, passes)))
            armed.watched.update(trained)
            for parameter in trained:
                if parameter not in self._handles:
                    attach: Any = parameter.register_post_accumulate_grad_hook
                    self._handles[parameter] = attach(_weakly(self._on_gradient))

    def disarm(self) -> None:
        """Expects no gradients any more, since the round is over or was begun anew. Local."""
        self._armed = None

    def _warn_of_held(self) -> None:
        if not self._warned and self._exchange.communicator.rank == 0:
            warnings.warn(
                "with several optimizers, what Horovod averages (uncompressed parameters, warm-up rounds, a "
                "node's gradients) waits for step() in spite of overlap=True: under way at the same time, "
                "means of several optimizers would not be the same bits in every run.",
                stacklevel=5,
            )
        self._warned = True

    def _hooks_wait(self) -> bool:
        """Returns True, and warns once, if there are step hooks: they fire once a step, after backward."""
        hooked = self._step_code.has_hooks()
        if hooked and not self._told_of_hooks:
            self._told_of_hooks = True
            warnings.warn(
                "the optimizer has step hooks, which fire once a step and may look at the model: so "
                "updates wait for step() in spite of overlap=True. Without hooks they leave during backward.",
                stacklevel=2,
            )
        return hooked

    def used(self, parameter: Tensor) -> bool:
        """Returns True if the parameter's gradient is used by an early local step or mean. Local."""
        return self._armed is not None and parameter in self._armed.used

    def check(self, closure: object, scale: object) -> None:
        """Raises ValueError for a closure or a GradScaler, RuntimeError for a gradient changed meanwhile.

        Raises also a failure of an early local step, and a change of options since. Local, except that it
        waits for the early local steps.
        """
        if closure is not None:
            raise ValueError("step(closure) computes gradients by itself: pass overlap=False.")
        if scale is not None:
            raise ValueError(
                "a GradScaler decides on a step after backward: pass overlap=False, or use bfloat16."
            )
        armed = self._armed
        if armed is None:
            return
        self._settle(armed)
        for parameter, (gradient, version) in armed.used.items():
            if parameter.grad is not gradient or gradient._version != version:
                raise RuntimeError(
                    "a gradient was changed after backward (clipped, scaled or dropped, say), but "
                    "overlap=True had used it already: pass overlap=False."
                )
        armed.note_options(self._inner.param_groups)
        if armed.failure:
            raise armed.failure

    def finish(self, local_step: LocalStep) -> None:
        """Takes the local step of the parameters that have not taken it during backward.

        Where workers have several ranks, it waits for the means of gradients: collective over the team.
        """
        if self._armed is None or not self.under_way:
            local_step()
            return
        if self._exchange.communicator.team.size > 1:  # starts all means before it waits for one
            while self._armed.expected:
                self._leave(self._armed, self._armed.expected.popleft()[0])
            self._take_means(self._armed, wait=True)
            self._settle(self._armed)
            return
        rest = [p for bucket_state, _ in self._armed.expected for p in bucket_state.bucket.parameters]
        step_here(self._inner, local_step, rest)

    def abandon(self) -> None:
        """Completes and drops the exchanges under way, before an error that all workers raise. Collective.

        Uses the buckets that all agreed on, without parameters that some ranks loaded or added since then.
        """
        armed = self._armed
        self.disarm()
        if armed is None:
            return
        if self._exchange.communicator.team.size > 1:
            here = [bucket_state for bucket_state, _ in armed.expected]
            for _, mean in [*armed.means, *map(self._mean, here)]:
                mean.done.result().take()
        self._exchange.abandon(armed.state)

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        armed = self._armed
        # At x, or after something was loaded or added, the local step is left to step().
        if armed is None or self._modes.at_x or not self._settled():
            return
        if armed.waits is None:
            joins = any(takes_part(p) for _, p, _ in armed.state.layout.frozen)
            armed.waits = joins or self._hooks_wait()
        if armed.waits:
            return
        if parameter in armed.used:
            raise RuntimeError(
                "a second backward pass reached a parameter that has taken its step: with overlap=True, say "
                f"how many there are before step(): backward_passes_per_step={armed.passes} was given."
            )
        armed.sources.note(parameter.device)
        for _, missing in armed.expected:
            if parameter in missing:
                missing[parameter] -= 1
                if not missing[parameter]:
                    del missing[parameter]
        while armed.expected and not armed.expected[0][1] and self._may_leave(armed, armed.expected[0][0]):
            refuse_capture([parameter.device], "backward, during which overlap=True sends updates,")
            self._leave(armed, armed.expected.popleft()[0])

    def _may_leave(self, armed: Armed, bucket_state: BucketState) -> bool:
        """Returns True if a bucket with all expected gradients waits for no more gradient, nor for step()."""
        trained = {parameter for parameter in bucket_state.bucket.parameters if parameter.requires_grad}
        return trained <= armed.watched and not self._exchange.held(armed.state, bucket_state)

    def _leave(self, armed: Armed, bucket_state: BucketState) -> None:
        parameters = bucket_state.bucket.parameters
        armed.sources.join(bucket_state.bucket.device)
        for parameter in parameters:
            prepare_sparse(parameter, self._inner, self._exchange.settings.sparse_as_dense)
        armed.note_options(self._inner.param_groups)
        gradients = {p: p.grad for p in parameters if p.grad is not None}
        armed.used |= {p: (gradient, gradient._version) for p, gradient in gradients.items()}
        if self._exchange.communicator.team.size > 1:
            sparse = [p for p, gradient in gradients.items() if gradient.is_sparse]
            if sparse and not self._exchange.settings.sparse_as_dense:
                names = {slot.parameter: slot.name for slot in bucket_state.bucket.slots}
                armed.failure = sparse_refused(names[sparse[0]])
            armed.look(gradients.values())
            armed.means.append(self._mean(bucket_state))
            self._take_means(armed)
        else:
            self._depart(armed, bucket_state, gradients)

    def _depart(self, armed: Armed, bucket_state: BucketState, gradients: dict[Tensor, Tensor]) -> None:
        """Checks a bucket's gradients, takes its local step and sends it.

        The check and the local step run in another thread if the optimizer's code suits other threads.
        """
        armed.note_options(self._inner.param_groups)
        bucket, inner = bucket_state.bucket, self._inner
        if not self._step_code.suits_other_threads():
            self._modes.leave_early(bucket.parameters)
            here = partial(step_here, inner, armed.local_step, bucket.parameters)
            self._take(armed, here, bucket.parameters, gradients.values())
            self._exchange.depart(armed.state, bucket_state)
            return
        step = step_elsewhere(inner, bucket.parameters)
        # Bumps the version counters now, so that autograd reports reuse as it would after an in-place step.
        raise_versions(gradients)
        self._modes.leave_early(bucket.parameters)

        take = partial(self._take, armed, step, bucket.parameters, gradients.values())
        self._exchange.depart(armed.state, bucket_state, take)

    def _take(
        self, armed: Armed, step: LocalStep, parameters: list[Tensor], gradients: Iterable[Tensor]
    ) -> None:
        """Takes a local step of some parameters, unless something failed before. Runs in any thread.

        It raises nothing: an exception becomes `armed.failure`.
        """
        try:
            armed.look(gradients)
            if armed.nonfinite or armed.failure:  # step() raises on all workers
                return
            device = parameters[0].device
            with self._exchange.statistics.phase("local_step", device), self._modes.early.step(parameters):
                step()
            armed.overflowed = armed.overflowed or not kernels.squares_fit(parameters)
        except Exception as failure:
            armed.failure = failure

    def _settle(self, armed: Armed) -> None:
        """Waits for the local steps in the background, and raises the first failure of a step or encoding."""
        self._exchange.wait_until_encoded()
        failure = armed.failure or self._exchange.failure
        if failure:
            raise failure

    # -- workers of several ranks -------------------------------------------------------------------

    def _mean(self, bucket_state: BucketState) -> tuple[BucketState, TeamMean]:
        """Begins to average a bucket's gradients over the team."""
        return bucket_state, self._exchange.means.begin([bucket_state.bucket])

    def _take_means(self, armed: Armed, wait: bool = False) -> None:
        """Starts the local steps of the buckets whose means are done, in order; with `wait`, of all."""
        as_sparse = takes_sparse_only(self._inner)
        while armed.means and (wait or armed.means[0][1].done.done()):
            bucket_state, mean = armed.means.popleft()
            with self._exchange.statistics.phase("node", bucket_state.bucket.device):
                mean.done.result().take()
            if kernels.all_finite(list(mean.flats)):
                self._exchange.means.take(mean, as_sparse)
            else:  # the ranks' own gradients stay, to tell which rank's was not finite
                armed.nonfinite = True
            gradients = {p: p.grad for p in bucket_state.bucket.parameters if p.grad is not None}
            armed.used |= {p: (gradient, gradient._version) for p, gradient in gradients.items()}
            self._depart(armed, bucket_state, gradients)


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Returns the method as a hook that does not keep the method's object alive."""
    reference = weakref.WeakMethod(method)

    def hook(parameter: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive(parameter)

    return hook
