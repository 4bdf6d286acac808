"""Averages gradients over a team, in full precision, in the background. Collective over the team."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_saef.memory.layout import Bucket, Layout, is_gapless
from hvd_saef.round.statistics import Statistics, ring_bytes
from hvd_saef.transport.background import Done
from hvd_saef.transport.buffers import Buffers
from hvd_saef.transport.communicator import Channel, Communicator

TOGETHER = 24 << 20
"""The most bytes of gradients in one allreduce, which has at least one bucket.

Each allreduce waits for Horovod's next cycle, so few large ones are faster.
"""


@dataclass
class TeamMean:
    """The gradients of some buckets while they are being averaged over the team."""

    buckets: Sequence[Bucket]
    flats: Sequence[Tensor]
    """For each bucket the output of :func:`pack`, which is replaced by the mean once `done` has finished.

    All lie in one `memory`, which is used again after :meth:`TeamMeans.take`.
    """
    done: Future[Done[None]]
    memory: Buffers


class TeamMeans:
    """Computes means over a team, one after the other, and keeps the memory for the next ones."""

    def __init__(self, communicator: Communicator, statistics: Statistics) -> None:
        self._communicator = communicator
        self._statistics = statistics
        self._idle: list[Buffers] = []

    def begin(self, buckets: Sequence[Bucket]) -> TeamMean:
        """Starts to average the gradients of `buckets`, in the background. Collective over the team.

        All ranks of the team begin the same buckets in the same order.
        """
        sizes, first = [bucket.numel + len(bucket.slots) for bucket in buckets], buckets[0]
        memory = self._idle.pop() if self._idle else Buffers()
        (room,) = memory.pieces("mean", [sum(sizes) * first.dtype.itemsize], first.device)
        together = room.view(first.dtype)
        flats = torch.split(together, sizes)
        for bucket, flat in zip(buckets, flats, strict=True):
            pack(bucket, flat)
        self._statistics.node_bytes_sent += ring_bytes(self._communicator.team.size, together.nbytes)
        work = self._communicator.background(Channel.MEANS)
        done = work.on(first.device, self._communicator.team.allreduce_mean, together, f"node.{first.index}")
        return TeamMean(buckets, flats, done, memory)

    def take(self, mean: TeamMean, as_sparse: bool) -> None:
        """Waits for the mean and writes it into the gradients."""
        mean.done.result().take()
        for bucket, flat in zip(mean.buckets, mean.flats, strict=True):
            unpack(bucket, flat, as_sparse)
        self._idle.append(mean.memory)

    def average(self, layout: Layout, as_sparse: bool, apart: bool) -> None:
        """Replaces every gradient by its mean over the team. Collective over the team.

        A missing gradient counts as zero, unless no rank has it. The buckets go in the order of backward,
        each `apart` or up to TOGETHER bytes in one mean; while one mean runs, the next one is packed.
        """
        under_way: deque[TeamMean] = deque()
        with self._statistics.phase("node", layout.devices[0]):
            for buckets in _chunks(layout, 0 if apart else TOGETHER):
                under_way.append(self.begin(buckets))
                if len(under_way) > 1:
                    self.take(under_way.popleft(), as_sparse)
            while under_way:
                self.take(under_way.popleft(), as_sparse)


@torch.no_grad()
def pack(bucket: Bucket, flat: Tensor) -> None:
    """Writes a bucket's gradients into `flat`, then for each parameter 1 or 0: it has a gradient or not.

    Local. A missing gradient is written as zeros.
    """
    gradients, views = [], []
    for slot, there in zip(bucket.slots, flat[bucket.numel :], strict=True):
        gradient = slot.parameter.grad
        there.fill_(gradient is not None)
        if gradient is None:
            slot.view(flat).zero_()
        else:
            gradients.append(gradient.to_dense())  # no copy, if it is dense
            views.append(slot.view(flat))
    if gradients:
        torch._foreach_copy_(views, gradients)


@torch.no_grad()
def unpack(bucket: Bucket, flat: Tensor, as_sparse: bool) -> None:
    """Writes the mean of several ranks' :func:`pack` into the gradients. Local.

    A gradient that no rank has stays missing.
    """
    gradients, views = [], []
    for slot, there in zip(bucket.slots, flat[bucket.numel :].tolist(), strict=True):
        if there == 0:
            continue
        parameter = slot.parameter
        if as_sparse:
            parameter.grad = slot.view(flat).to(parameter.dtype).to_sparse(min(1, parameter.dim()))
            continue
        if parameter.grad is None or parameter.grad.is_sparse or not is_gapless(parameter.grad):
            parameter.grad = torch.empty_like(parameter)  # an expanded gradient cannot be written to
        gradients.append(parameter.grad)
        views.append(slot.view(flat))
    if gradients:
        torch._foreach_copy_(gradients, views)


def _chunks(layout: Layout, most: int) -> list[list[Bucket]]:
    """Returns the buckets, the last first, in runs of one dtype and device, of at most `most` bytes each.

    A larger bucket is a run of its own.
    """
    chunks: list[list[Bucket]] = []
    held = 0
    for bucket in reversed(layout.buckets):
        if not bucket.numel:
            continue
        size = bucket.numel * bucket.dtype.itemsize
        last = chunks[-1][-1] if chunks else None
        alike = last is not None and (last.dtype, last.device) == (bucket.dtype, bucket.device)
        if alike and held + size <= most:
            chunks[-1].append(bucket)
            held += size
        else:
            chunks.append([bucket])
            held = size
    return chunks
