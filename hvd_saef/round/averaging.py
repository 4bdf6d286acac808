"""Averages errors (row 1) and moments over all workers, and gathers all parts of s. Collective."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hvd_saef.memory.layout import Layout
from hvd_saef.memory.state import BucketState, State, cut_stretches
from hvd_saef.round.statistics import Statistics, ring_bytes
from hvd_saef.settings import Settings
from hvd_saef.transport.communicator import Channel, Communicator


def averages_next(settings: Settings, state: State, bucket_state: BucketState) -> bool:
    """Returns True if row 1 (averaging e) begins the bucket's next round. Local."""
    period, bucket = settings.averaging_period, bucket_state.bucket
    if period is None or not bucket.numel:
        return False
    turn = bucket.index * period // len(state.buckets) if settings.averaging_spread else 0
    return (state.rounds + 2) % period == turn


@torch.no_grad()
def average_errors(
    communicator: Communicator,
    statistics: Statistics,
    buckets: Iterable[BucketState],
    wire_dtype: torch.dtype | None = None,
) -> None:
    """Row 1: replaces e by the mean of all workers' e, in place, by Horovod's ring allreduce. Collective.

    With a narrower `wire_dtype`, the part of e that clamping and rounding remove stays in this worker's e.
    """
    for bucket_state in buckets:
        with statistics.phase("averaging", bucket_state.bucket.device):
            e = wire = bucket_state.e
            if wire_dtype is not None:
                most = torch.finfo(wire_dtype).max / communicator.workers  # the sum must not overflow
                wire = e.clamp(-most, most).to(wire_dtype)
                e.sub_(wire)
            communicator.allreduce_mean(wire, f"error.{bucket_state.bucket.index}")
            if wire is not e:
                e.add_(wire)
            statistics.averaging_bytes_sent += ring_bytes(communicator.workers, wire.nbytes)
            statistics.node_bytes_sent += communicator.passed_on_of_mean(wire)


def whole_server_error(communicator: Communicator, bucket_state: BucketState) -> Tensor | None:
    """Returns all of a bucket's s, [numel], put together from the parts that the workers serve. Collective.

    Returns None with single-way compression, and s itself (no copy) where the server is not sharded.
    """
    s = bucket_state.s
    if s is None or not bucket_state.sharded:
        return s
    whole = torch.empty(bucket_state.bucket.numel, dtype=s.dtype, device=s.device)
    stretches = [whole[part.start : part.stop].view(torch.uint8) for part in bucket_state.parts]
    communicator.allgather(s.view(torch.uint8), stretches, Channel.DOWN)
    return whole


def whole_server_errors(communicator: Communicator, state: State) -> dict[str, Any]:
    """Returns all of s, by parameter name, on every worker. Collective."""
    whole: dict[str, Any] = {}
    for bucket_state in state.buckets:
        s = whole_server_error(communicator, bucket_state)
        if s is not None:
            whole |= cut_stretches(bucket_state.bucket, s, 0)
    return whole


def average_moments(communicator: Communicator, optimizer: torch.optim.Optimizer, layout: Layout) -> None:
    """Replaces the optimizer's moments by their means over the workers, in place. Collective.

    A moment is an entry of the state that is a floating tensor of its parameter's shape for every parameter
    that has the entry, on every worker. The entry "step", a count, is never a moment, not even where a
    parameter has no dimensions and the shapes agree.
    """
    mine: dict[str, bool] = {}
    for slot in layout.slots:
        for key, value in optimizer.state.get(slot.parameter, {}).items():
            fits = isinstance(value, Tensor) and value.is_floating_point()
            mine[key] = mine.get(key, True) and fits and value.shape == slot.parameter.shape
    everyone = communicator.allgather_object(mine)
    moments = {
        key for keys in everyone for key in keys if key != "step" and all(k.get(key, True) for k in everyone)
    }
    for slot in layout.slots:
        state = optimizer.state.get(slot.parameter, {})
        for key in sorted(moments):
            # A worker without any gradient so far contributes zeros, and its own state stays empty.
            moment = state.get(key, torch.zeros_like(slot.parameter))
            communicator.allreduce_mean(moment, f"state.{slot.name}.{key}")
