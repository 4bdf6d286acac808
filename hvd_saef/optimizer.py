"""What users hold: `hvd_saef.DistributedOptimizer`, called as Horovod's, and the class it returns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hvd_saef.arguments import (
    AVERAGE,
    GLOBAL_PROCESS_SET,
    HOROVODS_MODULE,
    advise_on_adaptive_rates,
    check_horovod_arguments,
    check_optimizer,
    compressor_chooser,
    give_advice,
    name_parameters,
)
from hvd_saef.compression import Compression
from hvd_saef.round.model_hooks import ModelHooks
from hvd_saef.round.session import Session
from hvd_saef.settings import Feedback, OnNonfinite, Server, Settings, Weights
from hvd_saef.transport.find import find_communicator
from hvd_saef.transport.nodes import Workers, find_workers, groups_of


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Any = Compression.sign,
    backward_passes_per_step: int = 1,
    op: Any = AVERAGE,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Any = None,
    sparse_as_dense: bool = False,
    process_set: Any = GLOBAL_PROCESS_SET,
    *,
    model: nn.Module | None = None,
    feedback: Feedback = "saef",
    step_ahead: float = 1.0,
    server_step_ahead: float = 0.0,
    double_compression: bool = True,
    averaging_period: int | None = None,
    averaging_spread: bool = False,
    averaging_fp16: bool = False,
    local_steps: int = 1,
    warmup_steps: int = 0,
    block_size: int | None = None,
    dense_below: int = 0,
    server: Server = "auto",
    bucket_bytes: int = Settings.bucket_bytes,
    overlap: bool = False,
    on_nonfinite: OnNonfinite = "raise",
    check_consensus_every: int = 0,
    worker: Workers = "rank",
    weights: Weights = "equal",
) -> Any:
    """Wrap `optimizer` so that each step exchanges compressed updates with step-ahead error feedback.

    Collective over the process set, as all of the returned optimizer's methods are that say so.
    The arguments before `model` are `horovod.torch.DistributedOptimizer`'s, in its order.

    Args:
        optimizer: the torch optimizer that takes the local steps. It is shared, not copied: its
            param_groups and state are the returned optimizer's. Momentum stays local.
        named_parameters: names for messages and state dicts, usually model.named_parameters().
        compression: a `Compressor` (`Compression.sign`, `.topk(0.01)`, `.none`, `.fp16`, or your own),
            one of Horovod's own two, or a callable (name, parameter) -> Compressor.
        backward_passes_per_step: backward passes whose gradients add up before step().
        op: `hvd.Average` only.
        gradient_predivide_factor: 1.0 only.
        num_groups: without effect.
        groups: without effect; buckets are formed by `bucket_bytes`.
        sparse_as_dense: make sparse gradients dense (not for SparseAdam, which takes none). Else the
            local step takes them as they are; where gradients are averaged, they are refused.
        process_set: the Horovod process set whose ranks are the workers. Ranks outside train alone.
        model: with it, forward passes in eval mode and model.state_dict() see x by themselves.
        feedback: "saef", "ef" (plain error feedback) or "none".
        step_ahead: α in [0, 1], with "saef" only.
        server_step_ahead: β in [0, 1]; with "saef", double_compression and a replicated server.
        double_compression: compress the server's answer too (DC); False is single-way (SC).
        averaging_period: p >= 2, rounds between two averagings of the errors; None is never.
        averaging_spread: average each bucket in a round of its own within the p, not all in one.
        averaging_fp16: average errors in float16; what that rounds away stays in each worker's error.
        local_steps: H >= 1, steps between two exchanges.
        warmup_steps: first rounds that exchange the dense mean.
        block_size: elements a block has at most; None: one block a tensor.
        dense_below: blocks of fewer elements travel as they are, in the same payload; their error stays 0.
        server: "sharded" cuts the server of DC between the workers, "replicated" runs it on each;
            "auto" is sharded with β = 0.
        bucket_bytes: bytes of x that travel together; an eighth in the first bucket, which leaves last.
        overlap: step and send each bucket while backward computes the others' gradients. Rules out
            whatever changes gradients after backward (clipping, GradScaler), closures, on_nonfinite="skip",
            and optimizers whose step writes to its parameter group. Those of torch.optim step in a thread of
            their own; others, and any with step hooks, in the one that computes, a call a bucket. After
            an error in a step, errors and momentum are those of a step half taken (x is not): load a
            checkpoint.
        on_nonfinite: "raise" NonFiniteUpdateError on all workers, or "skip" the step on all. A local step
            that overflows is undone on all, with the local steps since the round began, but for the
            optimizer's own state (see the error).
        check_consensus_every: rounds between two checks that x has the same bits on all workers, and a
            worker's state on all its ranks; 0 is off.
        worker: what a worker is. "rank", or "node": all ranks of a host, whose gradients are averaged in
            full precision before each local step, so that e, momentum and the rest are the node's. Or a list
            of groups of ranks, as Horovod process sets or lists of Horovod's ranks. Needs
            `hvd.init(process_sets=hvd_saef.process_sets())`.
        weights: "equal", for workers of the same number of ranks, or "ranks": each counts by its number.

    Returns:
        An instance of the wrapped optimizer's class, with the methods of :class:`SaefMethods`.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it, its value and what is allowed.
        RuntimeError: Horovod is not initialized, is elastic, or does not run on MPI.

    """
    check_horovod_arguments(op, gradient_predivide_factor)
    settings = Settings(
        feedback=feedback,
        step_ahead=step_ahead,
        server_step_ahead=server_step_ahead,
        double_compression=double_compression,
        averaging_period=averaging_period,
        averaging_spread=averaging_spread,
        averaging_fp16=averaging_fp16,
        local_steps=local_steps,
        warmup_steps=warmup_steps,
        block_size=block_size,
        server=server,
        bucket_bytes=bucket_bytes,
        overlap=overlap,
        on_nonfinite=on_nonfinite,
        check_consensus_every=check_consensus_every,
        worker=groups_of(worker),
        weights=weights,
        backward_passes_per_step=backward_passes_per_step,
        sparse_as_dense=sparse_as_dense,
    )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: a torch.nn.Module or None is allowed.")
    check_optimizer(optimizer)
    choose = compressor_chooser(compression, dense_below)
    names = name_parameters(optimizer, named_parameters)
    communicator, included = find_communicator(process_set)
    if not included:  # as with Horovod, a rank outside the process set trains alone
        settings = dataclasses.replace(Settings(feedback="none"), sparse_as_dense=sparse_as_dense)
        choose = compressor_chooser(Compression.none)

    communicator = find_workers(communicator, settings)

    wrapped = _share(optimizer)
    session = Session(optimizer, names, choose, settings, communicator)
    wrapped._saef = session
    _ = session.layout  # wrong parameters are found now, not at the first step
    if overlap and included and session.averages_gradients:
        raise ValueError(
            "overlap=True has nothing to send early with feedback='none' and a dense compressor, where "
            "gradients are averaged in step(): pass overlap=False."
        )
    _undo_horovods_initial_step(wrapped)
    if model is not None:
        ModelHooks(session.modes, session.origin.parameters_replaced).attach(model, names)
    if communicator.rank == 0 and included:
        give_advice(settings, compression, model)
        if not session.averages_gradients:
            advise_on_adaptive_rates(optimizer, communicator.workers)
    return wrapped


class SaefMethods:
    """What the returned optimizer has beside the wrapped optimizer's own methods."""

    _saef: Session

    def synchronize(self) -> None:
        """Horovod's recipe for clipping. The gradients seen after it are this worker's own.

        A worker of several ranks has their mean (collective). With feedback="none" and a dense compressor
        it is the mean over all workers, as Horovod's.
        """
        self._saef.synchronize()

    def skip_synchronize(self) -> AbstractContextManager[None]:
        """Horovod's recipe for clipping: take step() within `with optimizer.skip_synchronize():`."""
        return self._saef.skip_synchronize()

    def set_backward_passes_per_step(self, passes: int) -> None:
        """As Horovod's: how many backward passes add up before a step. Gradients add up by themselves."""
        self._saef.settings = dataclasses.replace(self._saef.settings, backward_passes_per_step=passes)

    def train(self) -> None:
        """Move the parameters to b (x, stepped ahead), where this worker trains. Idempotent, local."""
        self._saef.modes.train()

    def eval(self) -> None:
        """Move the parameters to x, the same on all workers: to evaluate or save. Idempotent, local."""
        self._saef.modes.eval()

    @contextmanager
    def consensus(self) -> Iterator[None]:
        """`with optimizer.consensus():` the parameters are x; afterwards where they were. Local."""
        evaluating = self._saef.modes.evaluating
        self.eval()
        try:
            yield
        finally:
            if not evaluating:
                self.train()

    def flush(self) -> None:
        """Complete a round early, for the last steps of an epoch with local_steps > 1. Collective."""
        self._saef.flush()

    def consolidate(self) -> None:
        """Average errors and momentum over the workers, once; completes a round first. Collective."""
        self._saef.consolidate()

    def reanchor(self) -> None:
        """Take x anew from rank 0's parameters as they are, and clear the errors. Collective.

        For parameters that were changed behind the optimizer's back.
        """
        self._saef.reanchor()

    def stats(self) -> dict[str, float]:
        """Numbers of this worker since it was wrapped. Local.

        rounds, skipped (steps); payload_bytes_sent and _received, averaging_bytes_sent,
        dense_bytes_sent; ring_allreduce_bytes, what a float32 ring allreduce would have sent in the
        same rounds; compression_ratio, that over all bytes sent. These are between workers, of all of this
        worker's ranks together; node_bytes_sent is what this rank sent to the others of its worker.
        error_norm and server_error_norm (Euclidean, of e and of the part of s that is here);
        seconds_<phase>.
        """
        return self._saef.stats()


@functools.cache
def _wrapped_class(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A subclass of `base` with SaefMethods, under base's name as Horovod's is."""

    # SaefMethods has no step(): Horovod's broadcast_optimizer_state calls
    # super(optimizer.__class__, optimizer).step(), which must be a local step of torch.
    class Wrapped(SaefMethods, base):  # type: ignore[misc, valid-type]
        _step_supports_amp_scaling = True
        _in_step = False

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """One local step, and every `local_steps`-th time the exchange. Collective."""
            scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            return self._saef.step(self._local_step, closure, scale, overflow)

        step.hooked = True  # type: ignore[attr-defined]  # torch's step hooks fire in super().step()

        def _local_step(self) -> None:
            # Gradients are unscaled by now; a fused optimizer that saw the scale would do it again.
            scaler = {
                name: getattr(self, name) for name in ("grad_scale", "found_inf") if hasattr(self, name)
            }
            self.__dict__.update(dict.fromkeys(scaler))
            self._in_step = True
            try:
                super().step()
            finally:
                self._in_step = False
                self.__dict__.update(scaler)

        def state_dict(self) -> dict[str, Any]:
            """The wrapped optimizer's, and ours under "hvd_saef". Local: each worker's is its own."""
            self._saef.take_in()
            self._saef.exchange.wait_until_encoded()
            state_dict: dict[str, Any] = super().state_dict()
            return state_dict | {"hvd_saef": self._saef.origin.export()}

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            """The inverse. Local; at the next step all workers agree who loaded what."""
            state_dict = dict(state_dict)
            ours = state_dict.pop("hvd_saef", None)
            self._saef.take_in()
            self._saef.exchange.wait_until_encoded()
            if ours is not None:
                self._saef.origin.check(ours, self._saef.kept)
            super().load_state_dict(state_dict)
            inner = self._saef.inner  # torch has replaced these two here
            inner.state, inner.param_groups = self.state, self.param_groups
            self._saef.origin.restore(ours, self._saef.kept)

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            """As torch's. All workers must add the same, between two rounds; its errors start at 0."""
            if self._saef.modes.local_steps_done:
                raise RuntimeError("add_param_group between local steps: call flush() first.")
            super().add_param_group(param_group)
            self._saef.grow()

    Wrapped.__name__, Wrapped.__qualname__ = base.__name__, base.__qualname__
    # Horovod's broadcast_optimizer_state tells by the module whether step() is collective.
    Wrapped.__module__ = HOROVODS_MODULE or __name__
    return Wrapped


def _share(inner: torch.optim.Optimizer) -> Any:
    """An instance of the wrapped class that shares everything with `inner`: groups, state and hooks."""
    wrapped = object.__new__(_wrapped_class(type(inner)))  # type: ignore[arg-type]
    # Not "step": a scheduler made before wrapping has put a patch of the inner step() there.
    vars(wrapped).update({name: value for name, value in vars(inner).items() if name != "step"})
    return wrapped


def _undo_horovods_initial_step(wrapped: Any) -> None:
    """Put parameters back that Horovod moves.

    hvd.broadcast_optimizer_state takes a step with zero gradients on ranks without state, past our
    step(), and weight decay moves the parameters there.
    """
    before: list[tuple[Tensor, Tensor]] = []

    def remember(optimizer: Any, args: Any, kwargs: Any) -> None:
        if not getattr(optimizer, "_in_step", True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            before[:] = [(p, p.detach().clone()) for p in parameters if p.grad is not None]

    def put_back(optimizer: Any, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        before.clear()

    wrapped.register_step_pre_hook(remember)
    wrapped.register_step_post_hook(put_back)
