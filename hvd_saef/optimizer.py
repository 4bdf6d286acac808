"""What users hold: `hvd_saef.DistributedOptimizer`, called as Horovod's, and the class it returns."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hvd_saef.communicator import find_communicator, hvd
from hvd_saef.compression import Compression, Compressor, DenseCompressor
from hvd_saef.layout import ChooseCompressor
from hvd_saef.modes import ModelHooks
from hvd_saef.session import Session
from hvd_saef.settings import Feedback, OnNonfinite, Server, Settings

AVERAGE: Any = hvd.Average if hvd else None
GLOBAL_PROCESS_SET: Any = hvd.global_process_set if hvd else None


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
    local_steps: int = 1,
    warmup_steps: int = 0,
    block_size: int | None = None,
    server: Server = "auto",
    bucket_bytes: int = Settings.bucket_bytes,
    overlap: Literal[False] = False,
    on_nonfinite: OnNonfinite = "raise",
    check_consensus_every: int = 0,
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
        num_groups, groups: without effect; buckets are formed by `bucket_bytes`.
        sparse_as_dense: make sparse gradients dense instead of refusing them.
        process_set: the Horovod process set whose ranks are the workers. Ranks outside train alone.
        model: with it, forward passes in eval mode and model.state_dict() see x by themselves.
        feedback: "saef", "ef" (plain error feedback) or "none".
        step_ahead: α in [0, 1], with "saef" only.
        server_step_ahead: β in [0, 1]; with "saef", double_compression and a replicated server.
        double_compression: compress the server's answer too (DC); False is single-way (SC).
        averaging_period: p >= 2, rounds between two averagings of the errors; None is never.
        local_steps: H >= 1, steps between two exchanges.
        warmup_steps: first rounds that exchange the dense mean.
        block_size: elements a block has at most; None: one block a tensor.
        server: "sharded" cuts the server of DC between the workers, "replicated" runs it on each;
            "auto" is sharded with more than two workers and β = 0.
        bucket_bytes: bytes of x that travel together.
        overlap: False only; not available yet.
        on_nonfinite: "raise" NonFiniteUpdateError on all workers, or "skip" the step on all.
        check_consensus_every: rounds between two checks that x has the same bits on all workers; 0 is off.

    Returns:
        An instance of the wrapped optimizer's class, with the methods of :class:`SaefMethods`.

    Raises:
        TypeError, ValueError: for a wrong argument, naming it, its value and what is allowed.
        RuntimeError: Horovod is not initialized, is elastic, or does not run on MPI.
    """
    _check_horovod_arguments(op, gradient_predivide_factor, overlap, check_consensus_every)
    settings = Settings(
        feedback=feedback,
        step_ahead=step_ahead,
        server_step_ahead=server_step_ahead,
        double_compression=double_compression,
        averaging_period=averaging_period,
        local_steps=local_steps,
        warmup_steps=warmup_steps,
        block_size=block_size,
        server=server,
        bucket_bytes=bucket_bytes,
        on_nonfinite=on_nonfinite,
        backward_passes_per_step=backward_passes_per_step,
        sparse_as_dense=sparse_as_dense,
    )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: a torch.nn.Module or None is allowed.")
    _check_optimizer(optimizer)
    choose = _compressor_chooser(compression)
    names = _name_parameters(optimizer, named_parameters)
    communicator, included = find_communicator(process_set)
    if not included:  # as with Horovod, a rank outside the process set trains alone
        settings = dataclasses.replace(Settings(feedback="none"), sparse_as_dense=sparse_as_dense)
        choose = _compressor_chooser(Compression.none)

    wrapped = _share(optimizer)
    session = Session(wrapped, names, choose, settings, communicator, check_consensus_every)
    wrapped._saef = session
    _ = session.layout  # wrong parameters are found now, not at the first step
    _undo_horovods_initial_step(wrapped)
    if model is not None:
        ModelHooks(session.modes).attach(model)
    if communicator.rank == 0 and included:
        _give_advice(session, compression, model)
    return wrapped


class SaefMethods:
    """What the returned optimizer has beside the wrapped optimizer's own methods."""

    _saef: Session

    def synchronize(self) -> None:
        """Horovod's recipe for clipping. The gradients seen after it are this worker's own.

        Only with feedback="none" and a dense compressor does it average them, as Horovod does.
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
        """Take x anew from rank 0's parameters and clear the errors. Collective.

        For parameters that were changed behind the optimizer's back. In training mode they are
        taken as they are, so write a new x while in `eval()` mode or over all of them.
        """
        self._saef.reanchor()

    def stats(self) -> dict[str, float]:
        """Numbers of this worker since it was wrapped. Local.

        rounds, skipped (steps); payload_bytes_sent and _received, averaging_bytes_sent,
        dense_bytes_sent; ring_allreduce_bytes, what a float32 ring allreduce would have sent in the
        same rounds; compression_ratio, that over all bytes sent; error_norm and server_error_norm
        (Euclidean, of e and of the part of s that is here); seconds_<phase>.
        """
        return self._saef.stats()


@functools.cache
def _wrapped_class(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A subclass of `base` with SaefMethods, under base's name as Horovod's is."""

    # `base` comes first in the method resolution order: Horovod's broadcast_optimizer_state calls
    # super(optimizer.__class__, optimizer).step(), which must be the local step of torch.
    class Wrapped(base, SaefMethods):  # type: ignore[misc, valid-type]
        _step_supports_amp_scaling = True
        _in_step = False

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """One local step, and every `local_steps`-th time the exchange. Collective."""
            return self._saef.step(self._local_step, closure)

        step.hooked = True  # type: ignore[attr-defined]  # torch's step hooks fire in super().step()

        def _local_step(self) -> None:
            # Gradients are unscaled by now; a fused optimizer that saw the scale would do it again.
            scaler = {name: vars(self)[name] for name in ("grad_scale", "found_inf") if name in vars(self)}
            vars(self).update(dict.fromkeys(scaler))
            self._in_step = True
            try:
                super().step()
            finally:
                self._in_step = False
                vars(self).update(scaler)

        def state_dict(self) -> dict[str, Any]:
            """The wrapped optimizer's, and ours under "hvd_saef". Local: each worker's is its own."""
            return super().state_dict() | {"hvd_saef": self._saef.export()}

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            """The inverse. Local; at the next step all workers agree who loaded what."""
            state_dict = dict(state_dict)
            ours = state_dict.pop("hvd_saef", None)
            if ours is not None:
                self._saef.check(ours)
            super().load_state_dict(state_dict)
            self._saef.restore(ours)

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            """As torch's, before the first step."""
            self._saef.check_can_grow()
            super().add_param_group(param_group)
            self._saef.grow()

    Wrapped.__name__, Wrapped.__qualname__ = base.__name__, base.__qualname__
    # Horovod's broadcast_optimizer_state tells by the module whether step() is collective.
    Wrapped.__module__ = hvd.DistributedOptimizer.__module__ if hvd else __name__
    return Wrapped


def _share(optimizer: torch.optim.Optimizer) -> Any:
    """An instance of the wrapped class that shares everything with `optimizer` but its step hooks."""
    wrapped = object.__new__(_wrapped_class(type(optimizer)))
    for name, value in vars(optimizer).items():
        if name != "step":  # a scheduler's patch of the original's step()
            vars(wrapped)[name] = copy.copy(value) if name.startswith("_optimizer_step_") else value
    return wrapped


def _undo_horovods_initial_step(wrapped: Any) -> None:
    """hvd.broadcast_optimizer_state takes a step with zero gradients on ranks without state, past our
    step(). Weight decay would move the parameters there: put them back."""
    before: list[tuple[Tensor, Tensor]] = []

    def remember(optimizer: Any, args: Any, kwargs: Any) -> None:
        if not optimizer._in_step:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            before[:] = [(p, p.detach().clone()) for p in parameters if p.grad is not None]

    def put_back(optimizer: Any, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        before.clear()

    wrapped.register_step_pre_hook(remember)
    wrapped.register_step_post_hook(put_back)


def _check_horovod_arguments(op: Any, predivide: float, overlap: bool, check_every: int) -> None:
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        raise RuntimeError(
            "HOROVOD_ELASTIC=1: elastic Horovod is not supported, since a worker that leaves takes its "
            "error with it. Start the job without --min-np, --max-np and a host discovery script."
        )
    if op != AVERAGE:
        raise ValueError(
            f"op={op!r}: only hvd.Average is allowed: the algorithm applies the mean of the workers' updates. "
            "For a sum, scale the learning rate by hvd.size()."
        )
    if predivide != 1.0:
        raise ValueError(
            f"gradient_predivide_factor={predivide!r}: only 1.0 is allowed: gradients are not summed, so "
            "there is nothing to divide before or after."
        )
    if overlap is not False:
        raise ValueError(f"overlap={overlap!r}: only False is allowed; it is not available yet.")
    if isinstance(check_every, bool) or not isinstance(check_every, int):
        raise TypeError(f"check_consensus_every={check_every!r}: a whole number >= 0 is allowed; 0 is off.")
    if check_every < 0:
        raise ValueError(f"check_consensus_every={check_every!r}: a whole number >= 0 is allowed; 0 is off.")


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer={optimizer!r}: a torch.optim.Optimizer is allowed.")
    if isinstance(optimizer, SaefMethods) or (hvd and type(optimizer).__module__ == hvd.optimizer.__name__):
        raise TypeError(
            f"optimizer={type(optimizer).__name__} is a DistributedOptimizer already: give the torch "
            "optimizer, and wrap it once."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer=LBFGS: it evaluates its closure several times a step, with line searches that "
            "workers would end at different points. Every other optimizer of torch.optim is allowed."
        )


def _name_parameters(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]] | None
) -> dict[Tensor, str]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if named_parameters is None:
        return {
            p: f"noname.{i}.{j}"
            for i, group in enumerate(optimizer.param_groups)
            for j, p in enumerate(group["params"])
        }
    pairs = list(named_parameters)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(
                f"named_parameters holds {pair!r}: tuples (name, parameter) are allowed, as "
                "model.named_parameters() gives them."
            )
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"named_parameters holds the name {name!r} twice: each must be unique.")
        seen.add(name)
    names = {parameter: name for name, parameter in sorted(pairs, key=lambda pair: pair[0])}
    for parameter in parameters:
        if parameter not in names:
            raise ValueError(
                f"named_parameters names no parameter of shape {tuple(parameter.shape)} that the optimizer "
                "has: pass the model.named_parameters() of all its models, or None."
            )
    return names


def _compressor_chooser(compression: Any) -> ChooseCompressor:
    allowed = (
        "a hvd_saef.Compressor (Compression.sign, .topk(ratio), .none, .fp16), hvd.Compression.none or "
        ".fp16, or a callable (name, parameter) -> Compressor is allowed"
    )
    fixed = _as_compressor(compression)
    if fixed is not None:
        return lambda name, parameter: fixed
    if isinstance(compression, type) or not callable(compression):
        raise TypeError(f"compression={compression!r}: {allowed}.")

    def choose(name: str, parameter: Tensor) -> Compressor:
        value = compression(name, parameter)
        chosen = _as_compressor(value)
        if chosen is None:
            raise TypeError(f"compression={compression!r} gave {value!r} for parameter {name!r}: {allowed}.")
        return chosen

    return choose


def _as_compressor(value: Any) -> Compressor | None:
    if isinstance(value, Compressor):
        return value
    if hvd and value is hvd.Compression.none:
        return Compression.none
    if hvd and value is hvd.Compression.fp16:
        return Compression.fp16
    return None


def _give_advice(session: Session, compression: Any, model: nn.Module | None) -> None:
    if not isinstance(compression, DenseCompressor) and isinstance(_as_compressor(compression), DenseCompressor):
        warnings.warn(
            f"compression={compression.__name__} is Horovod's own: nothing is compressed below 16 bits. "
            "For 1 bit a parameter leave it out, or pass hvd_saef.Compression.sign.",
            stacklevel=3,
        )
    if model is None and (session.settings.alpha > 0 or session.settings.beta > 0):
        warnings.warn(
            "parameters are stepped ahead while training, differently on each worker. Pass model=model to "
            "hvd_saef.DistributedOptimizer, or put evaluation and saving into "
            "`with optimizer.consensus():`, to see the consensus point x.",
            stacklevel=3,
        )
