"""Errors over all workers: row 1, when and how; and s whole, from the parts that are served. Collective."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hvd_saef.memory.state import BucketState, State, cut_stretches
from hvd_saef.round.statistics import Statistics, ring_bytes
from hvd_saef.settings import Settings
from hvd_saef.transport.communicator import Channel, Communicator


def averages_next(settings: Settings, state: State, bucket_state: BucketState) -> bool:
    """Whether the bucket's next round begins with row 1. Local."""
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
    """Row 1: e ← the mean of all workers' e, by Horovod's ring allreduce.

    What a narrower `wire_dtype` rounds away stays in this worker's e.
    """
    with statistics.phase("averaging"):
        for bucket_state in buckets:
            e = wire = bucket_state.e
            if wire_dtype is not None:
                most = torch.finfo(wire_dtype).max / communicator.workers  # the sum must fit, too
                wire = e.clamp(-most, most).to(wire_dtype)
                e.sub_(wire)
            communicator.allreduce_mean(wire, f"error.{bucket_state.bucket.index}")
            if wire is not e:
                e.add_(wire)
            statistics.averaging_bytes_sent += ring_bytes(communicator.workers, wire.nbytes)
            statistics.node_bytes_sent += communicator.passed_on_of_mean(wire)


def whole_server_error(communicator: Communicator, bucket_state: BucketState) -> Tensor | None:
    """A bucket's s, flat, from the parts that the workers serve; None with single-way compression."""
    s = bucket_state.s
    if s is None or not bucket_state.sharded:
        return s
    whole = torch.empty(bucket_state.bucket.numel, dtype=s.dtype, device=s.device)
    stretches = [whole[part.start : part.stop].view(torch.uint8) for part in bucket_state.parts]
    communicator.allgather(s.view(torch.uint8), stretches, Channel.DOWN)
    return whole


def whole_server_errors(communicator: Communicator, state: State) -> dict[str, Any]:
    """All of s, by parameter, on every worker."""
    whole: dict[str, Any] = {}
    for bucket_state in state.buckets:
        s = whole_server_error(communicator, bucket_state)
        if s is not None:
            whole |= cut_stretches(bucket_state.bucket, s, 0)
    return whole
