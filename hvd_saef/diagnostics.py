"""Measures what compression does during training: gradient mismatch, errors, and the quality of C.

    monitor = hvd_saef.diagnostics.Monitor(optimizer, every=50, csv="mismatch.csv")

Training goes on as before. All numbers are squared Euclidean norms, as in the paper's Figure 3, without the
paper's factors L² and σ².
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvd_saef.compression import BlockedTensor, Compression, Draws
from hvd_saef.errors import ConfigurationMismatchError, who_has_what
from hvd_saef.memory import algorithm
from hvd_saef.memory.state import BucketState
from hvd_saef.round.averaging import whole_server_error
from hvd_saef.round.session import Session
from hvd_saef.transport.together import together


@dataclass(frozen=True)
class Measurement:
    """One round's numbers, the same on all workers: means over the workers k, sums over all parameters."""

    round: float
    """The number t of rounds completed before this one."""
    mismatch_exact: float
    """The mean of ‖x̃ - b_k‖² = ‖(1-β)·s + ē - α·e_k‖²: how far from x̃ the workers take gradients."""
    mismatch_bound_ef: float
    """The paper's bound for EF (Eq. 9), ‖s‖² + mean ‖e_k‖², for any feedback. Exact <= 2 bounds."""
    mismatch_bound_saef: float
    """The bound for SAEF (Eq. 10), ‖s‖² + mean ‖e_k - ē‖²; right after an averaging it is ‖s‖² (Eq. 11)."""
    server_error: float
    """The squared norm of the server's error, ‖s‖²."""
    error: float
    """The mean of ‖e_k‖²."""
    mean_error: float
    """The squared norm of the mean error, ‖ē‖²; if `error_variance` is at most this, stepping ahead pays."""
    error_variance: float
    """The mean of ‖e_k - ē‖²."""
    update: float
    """The mean of ‖b_k - y_k‖², the size of the local updates, with which errors can be compared."""
    delta: float
    """The δ of C (Eq. 14) on the workers' updates, the mean of 1 - ‖Δ_k - C(Δ_k)‖² / ‖Δ_k‖²."""

    @property
    def step_ahead_pays(self) -> bool:
        """True if the condition of Proposition 1 holds: Var(e_k) <= ‖E e_k‖²."""
        return self.error_variance <= self.mean_error


NUMBERS = [field.name for field in fields(Measurement)]


class Monitor:
    """Measures every `every`-th round of a `hvd_saef.DistributedOptimizer`, within its step().

    Collective: every worker makes a Monitor, with the same `every`. A measurement costs one allreduce of the
    errors (4 bytes a float32 parameter by ring, like an error averaging), an allgather of s if the server is
    sharded, one encoding and a few passes over memory. stats() does not count these bytes. A measurement only
    reads: training gives the same bits with and without a Monitor.

    `csv` names a file, which rank 0 overwrites with a row for each measurement. `tensorboard` is a
    `torch.utils.tensorboard.SummaryWriter` (or anything with its add_scalar), which rank 0 uses.

    Raises ValueError with overlap=True, whose steps have no moment between local step and exchange, and where
    gradients are averaged uncompressed, so that there is nothing to measure. An error on one rank, for
    example a file that cannot be written, is raised on all ranks. If a measurement in step() fails, the
    exchange after it takes place first, so the round is complete when all ranks raise.
    """

    def __init__(
        self,
        optimizer: Any,
        every: int,
        csv: str | os.PathLike[str] | None = None,
        tensorboard: Any = None,
    ) -> None:
        self._session: Session = optimizer._saef
        self._every, self._tensorboard = every, tensorboard
        self._since: list[Measurement] = []
        self._csv = Path(csv) if csv is not None and self._session.communicator.rank == 0 else None
        everyone = together(self._session.communicator, self._begin)
        if len(set(everyone)) > 1:
            raise ConfigurationMismatchError(
                f"workers disagree on every: {who_has_what(everyone)}. Make it the same on all of them."
            )
        self._session.before_exchange.append(self._look)

    def _begin(self) -> int:
        """Raises for wrong arguments on this rank; returns `every`, which must be the same on all ranks."""
        every = self._every
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: a whole number of rounds >= 1 is allowed.")
        if self._session.settings.overlap:
            raise ValueError("overlap=True cannot be measured: wrap the optimizer with overlap=False.")
        for bucket in self._session.parameters.layout.buckets:
            if not bucket.compressor.deterministic:
                raise ValueError(
                    f"{bucket.compressor.description} says deterministic = False: what is measured would not "
                    "be what is sent. See hvd_saef.Compressor.encode for random numbers that can be measured."
                )
        if self._session.parameters.averages_gradients:
            raise ValueError("gradients are averaged uncompressed: there are no errors to measure.")
        if self._csv:
            _append(self._csv, "w", NUMBERS)
        return every

    def close(self) -> None:
        """Ends the measurements. Collective, like making a Monitor; a second call does nothing."""
        here = self._look in self._session.before_exchange
        if all(together(self._session.communicator, lambda: here)):
            self._session.before_exchange.remove(self._look)

    def means(self) -> dict[str, float]:
        """Returns the means of the measurements since the last call, by name; {} without any. Local."""
        taken, self._since = self._since, []
        columns = zip(*map(astuple, taken), strict=True)
        return {name: sum(column) / len(taken) for name, column in zip(NUMBERS, columns, strict=False)}

    def _look(self) -> None:
        session = self._session
        state = session.modes.state
        if state is None or state.rounds % self._every:
            return
        measurement = measure(session)
        self._since.append(measurement)
        if session.communicator.rank == 0:
            if self._csv:
                _append(self._csv, "a", astuple(measurement))
            if self._tensorboard is not None:
                for name, value in asdict(measurement).items():
                    if name != "round":
                        self._tensorboard.add_scalar(f"hvd_saef/{name}", value, int(measurement.round))


@torch.no_grad()
def measure(session: Session) -> Measurement:
    """Returns the numbers of the current round, between its last local step and its exchange. Collective."""
    state, settings, communicator = session.modes.state, session.settings, session.communicator
    if state is None:
        raise RuntimeError("nothing to measure before the first step.")
    totals = dict.fromkeys((*NUMBERS, "sent", "lost"), 0.0)
    failure: Exception | None = None
    for bucket_state in session.exchange.order(state):
        e, s, mean = _errors(session, bucket_state)
        try:
            change, residual = _compressed(session, bucket_state, state.rounds < settings.warmup_steps)
        except Exception as error:  # other ranks need the next buckets' collectives, and learn of it later
            failure = error
            continue
        off = mean - e
        mismatch = mean - settings.alpha * e + (1 - settings.beta) * s
        totals["mismatch_exact"] += _squared(mismatch)
        totals["server_error"] += _squared(s)
        totals["error"] += _squared(e)
        totals["mean_error"] += _squared(mean)
        totals["error_variance"] += _squared(off)
        totals["update"] += _squared(change)
        totals["sent"] += _squared(change.add_(e))
        totals["lost"] += _squared(residual)
    totals["delta"] = 1 - totals["lost"] / totals["sent"] if totals["sent"] else 1.0

    def told() -> dict[str, float]:
        if failure is not None:
            raise failure
        return totals

    everyone = together(communicator, told)
    means = {name: sum(k[name] for k in everyone) / len(everyone) for name in NUMBERS}
    means["mismatch_bound_ef"] = means["server_error"] + means["error"]
    means["mismatch_bound_saef"] = means["server_error"] + means["error_variance"]
    return Measurement(**means | {"round": float(state.rounds)})


def _errors(session: Session, bucket_state: BucketState) -> tuple[Tensor, Tensor, Tensor]:
    """Returns this worker's e, the whole s (0 with single-way compression), and ē, the mean of all e.

    Each has shape [numel] of the bucket. Collective.
    """
    mean = bucket_state.e.clone()
    session.communicator.allreduce_mean(mean, f"diagnostics.{bucket_state.bucket.index}")
    s = whole_server_error(session.communicator, bucket_state)
    return bucket_state.e, torch.zeros_like(mean) if s is None else s, mean


def _compressed(session: Session, bucket_state: BucketState, rounds: int) -> tuple[Tensor, Tensor]:
    """Returns b - y, and Δ - C(Δ) as row 4 will compute it; each has shape [numel] of the bucket. Local."""
    bucket = bucket_state.bucket
    y, change = bucket.new_flat(), session.exchange.start_point(bucket_state)
    if bucket.parameters:
        torch._foreach_copy_(bucket.views(y), bucket.parameters)
    residual = bucket_state.e.clone()
    algorithm.add_update(residual, change, y)
    warmup = rounds < session.settings.warmup_steps
    compressor = Compression.none if warmup else bucket.compressor
    (whole,) = bucket.parts(1)
    payload = torch.empty(compressor.payload_bytes(whole.blocks), dtype=torch.uint8, device=bucket.device)
    draws = Draws.of(rounds, bucket.index, session.communicator.worker)
    compressor.encode(BlockedTensor(residual, whole.blocks, draws), payload)
    return change, residual


@contextmanager
def auxiliary_point(optimizer: Any) -> Iterator[None]:
    """Returns a context in which the parameters are at the paper's auxiliary point x̃ = x - (s + ē).

    Use it to evaluate there. After the context the parameters are where they were before. Entering is
    collective: it takes one allreduce of the errors, and an allgather of s if the server is sharded. Before
    the first step x̃ is x.

    Raises RuntimeError on all ranks between backward and step() with overlap=True.
    """
    session: Session = optimizer._saef
    session.meet("auxiliary_point()")
    with optimizer.consensus():
        state = session.modes.state
        if state is not None:
            for bucket_state in session.exchange.order(state):
                _, s, mean = _errors(session, bucket_state)
                bucket_state.show(bucket_state.x - (s + mean))
        try:
            yield
        finally:
            if state is not None:
                state.show_x()


def _squared(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _append(path: Path, mode: str, row: Any) -> None:
    with open(path, mode, newline="") as file:
        csv.writer(file).writerow(row)
