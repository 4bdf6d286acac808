"""`overlap=True`: buckets step and leave while backward still computes the gradients of others. Collective.

The payloads are under way when step() begins; x and the parameters change in step() alone, once all
workers have agreed on it. All workers send their buckets in the same order, the last one first. Where a
worker has several ranks, a bucket's gradients are averaged over them first, in the background as well.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.exchange import Exchange
from hvd_saef.gradients import (
    NodeMean,
    prepare_sparse,
    sparse_refused,
    takes_sparse_only,
    unpack,
    values,
)
from hvd_saef.layout import takes_part
from hvd_saef.modes import Modes
from hvd_saef.state import BucketState, State

LocalStep = Callable[[], None]


@dataclass
class Armed:
    """What is expected of the next backward passes."""

    state: State
    local_step: LocalStep
    passes: int
    expected: deque[tuple[BucketState, dict[Tensor, int]]]
    """The buckets that have not left, in their order; for each parameter the passes still to come."""
    means: deque[tuple[BucketState, NodeMean]] = field(default_factory=deque)
    """Of the buckets that have left for their ranks' mean and not been seen since."""
    used: dict[Tensor, int] = field(default_factory=dict)
    """The version of each gradient that a local step has used, or a mean has."""
    failure: Exception | None = None
    """What step() is to raise."""
    nonfinite: bool = False
    """Whether a gradient held a NaN or an infinity."""
    overflowed: bool = False
    """Whether a local step made such a number."""
    waits: bool | None = None
    """Whether all is left to step(), which takes unfrozen parameters in; known from the first gradient on."""


class Overlap:
    """Watches the parameters of one optimizer for the gradients of a round's last local step."""

    def __init__(self, exchange: Exchange, modes: Modes, inner: torch.optim.Optimizer) -> None:
        self._exchange = exchange
        self._modes = modes
        self._inner = inner
        self._armed: Armed | None = None
        self._handles: dict[Tensor, Any] = {}
        weakref.finalize(self, _remove, self._handles)

    @property
    def under_way(self) -> bool:
        """Whether any bucket has left in this round."""
        return self._exchange.busy or (self._armed is not None and bool(self._armed.means))

    @property
    def nonfinite(self) -> bool:
        """Whether a gradient that came early held a NaN or an infinity."""
        return self._armed is not None and self._armed.nonfinite

    @property
    def overflowed(self) -> bool:
        """Whether an early local step made a number NaN, infinite, or nearly."""
        return self._armed is not None and self._armed.overflowed

    def arm(self, local_step: LocalStep, passes: int) -> None:
        """A round's last local step comes next: expect its gradients, `passes` for each parameter."""
        state = self._modes.state
        if state is None:
            return
        self._armed = Armed(state, local_step, passes, deque())
        for bucket_state in self._exchange.order(state):
            trained = [p for p in bucket_state.bucket.parameters if p.requires_grad]
            self._armed.expected.append((bucket_state, dict.fromkeys(trained, passes)))
            for parameter in trained:
                if parameter not in self._handles:
                    attach: Any = parameter.register_post_accumulate_grad_hook
                    self._handles[parameter] = attach(_weakly(self._on_gradient))

    def disarm(self) -> None:
        """The round is over: let what comes next go the ordinary way."""
        self._armed = None

    def used(self, parameter: Tensor) -> bool:
        """Whether the parameter has taken its local step."""
        return self._armed is not None and parameter in self._armed.used

    def check(self, closure: object, scale: object) -> None:
        """Raise ValueError or RuntimeError for what does not go together with overlap=True."""
        if closure is not None:
            raise ValueError("step(closure) computes gradients by itself: pass overlap=False.")
        if scale is not None:
            raise ValueError(
                "a GradScaler decides on a step after backward: pass overlap=False, or use bfloat16."
            )
        if self._armed and self._armed.failure:
            raise self._armed.failure
        for parameter, version in self._armed.used.items() if self._armed else ():
            if parameter.grad is not None and parameter.grad._version != version:
                raise RuntimeError(
                    "a gradient was changed after backward (clipped or scaled, say), but overlap=True had "
                    "used it already: pass overlap=False."
                )

    def finish(self, local_step: LocalStep) -> None:
        """The local step of the parameters that have not taken it."""
        if self._armed is None or not self.under_way:
            local_step()
            return
        if self._exchange.communicator.node.size > 1:  # all means are under way before one is waited for
            while self._armed.expected:
                self._leave(self._armed, self._armed.expected.popleft()[0])
            self._take_means(self._armed, wait=True)
            return
        rest = [p for bucket_state, _ in self._armed.expected for p in bucket_state.bucket.parameters]
        with _only(self._inner.param_groups, rest):
            local_step()

    def abandon(self) -> None:
        """After an error that all workers raise: take from the wire what is on it. Collective."""
        armed, state = self._armed, self._modes.state
        self.disarm()
        if state is None:
            return
        if self._exchange.communicator.node.size > 1:
            order = self._exchange.order(state)
            here = order if armed is None else [bucket_state for bucket_state, _ in armed.expected]
            means = [*(armed.means if armed else ()), *map(self._mean, here)]
            for _, mean in means:
                mean.done.result()
        self._exchange.abandon(state)

    @torch.no_grad()
    def _on_gradient(self, parameter: Tensor) -> None:
        armed = self._armed
        if armed is None or self._modes.at_x:  # at x, the local step waits for step()
            return
        if armed.waits is None:
            armed.waits = any(takes_part(p) for _, p, _ in armed.state.layout.frozen)
        if armed.waits:
            return
        if parameter in armed.used:
            raise RuntimeError(
                "a second backward pass reached a parameter that has taken its step: with overlap=True, say "
                f"how many there are before step(): backward_passes_per_step={armed.passes} was given."
            )
        for _, missing in armed.expected:
            if parameter in missing:
                missing[parameter] -= 1
                if not missing[parameter]:
                    del missing[parameter]
        while armed.expected and not armed.expected[0][1]:
            self._leave(armed, armed.expected.popleft()[0])

    def _leave(self, armed: Armed, bucket_state: BucketState) -> None:
        parameters = bucket_state.bucket.parameters
        for parameter in parameters:
            prepare_sparse(parameter, self._inner, self._exchange.settings.sparse_as_dense)
        gradients = {p: p.grad for p in parameters if p.grad is not None}
        armed.used |= {p: gradient._version for p, gradient in gradients.items()}
        armed.nonfinite = armed.nonfinite or not kernels.all_finite([values(g) for g in gradients.values()])
        if self._exchange.communicator.node.size > 1:
            sparse = [p for p, gradient in gradients.items() if gradient.is_sparse]
            if sparse and not self._exchange.settings.sparse_as_dense:
                names = {slot.parameter: slot.name for slot in bucket_state.bucket.slots}
                armed.failure = sparse_refused(names[sparse[0]])
            armed.means.append(self._mean(bucket_state))
            self._take_means(armed)
        else:
            self._step(armed, bucket_state)

    def _step(self, armed: Armed, bucket_state: BucketState) -> None:
        """One bucket's local step, and off."""
        parameters = bucket_state.bucket.parameters
        if not armed.nonfinite:  # else step() raises on all workers, which expect the bucket nevertheless
            with _only(self._inner.param_groups, parameters), self._exchange.statistics.phase("local_step"):
                armed.local_step()
            armed.overflowed = armed.overflowed or not kernels.squares_fit(parameters)
        self._exchange.depart(armed.state, bucket_state)

    # -- workers of several ranks -------------------------------------------------------------------

    def _mean(self, bucket_state: BucketState) -> tuple[BucketState, NodeMean]:
        """Begin to average a bucket's gradients over the worker's ranks."""
        exchange = self._exchange
        return bucket_state, NodeMean.begin(exchange.communicator, exchange.statistics, [bucket_state.bucket])

    def _take_means(self, armed: Armed, wait: bool = False) -> None:
        """The local steps of the buckets whose mean is there, in their order; or of all."""
        as_sparse = takes_sparse_only(self._inner)
        while armed.means and (wait or armed.means[0][1].done.done()):
            bucket_state, mean = armed.means.popleft()
            with self._exchange.statistics.phase("node"):
                mean.done.result()
            if kernels.all_finite(list(mean.flats)):
                unpack(bucket_state.bucket, mean.flats[0], as_sparse)
            else:  # whose gradient it was is seen in the ranks' own, which stay
                armed.nonfinite = True
            gradients = {p: p.grad for p in bucket_state.bucket.parameters if p.grad is not None}
            armed.used |= {p: gradient._version for p, gradient in gradients.items()}
            self._step(armed, bucket_state)


@contextmanager
def _only(groups: list[dict[str, Any]], parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within, the optimizer of these groups has these parameters only."""
    wanted, whole = set(parameters), [(group, group["params"]) for group in groups]
    for group, everything in whole:
        group["params"] = [p for p in everything if p in wanted]
    groups[:] = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        groups[:] = [group for group, _ in whole]
        for group, everything in whole:
            group["params"] = everything


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """The method as a hook that does not keep its object."""
    reference = weakref.WeakMethod(method)

    def hook(parameter: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive(parameter)

    return hook


def _remove(handles: dict[Tensor, Any]) -> None:
    for handle in handles.values():
        handle.remove()
