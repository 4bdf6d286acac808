"""Gradients: sparse ones made ready for the local step; and their means, over a node or all workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_saef.communicator import Channel, Communicator
from hvd_saef.layout import Bucket, Layout
from hvd_saef.statistics import Statistics, ring_bytes

TOGETHER = 24 << 20
"""Bytes of gradients in one allreduce on a node, at most: each of these waits for Horovod's next cycle.

Much more and the C library maps new memory for every one.
"""


def prepare_sparse(parameter: Tensor, optimizer: torch.optim.Optimizer, as_dense: bool) -> None:
    """Make a sparse gradient dense if wanted and taken by the optimizer, else of one value a place. Local."""
    gradient = parameter.grad
    if gradient is None or not gradient.is_sparse:
        return
    if as_dense and not takes_sparse_only(optimizer):
        parameter.grad = gradient.to_dense()
    else:  # the sum of several values may overflow
        parameter.grad = gradient.coalesce()


def takes_sparse_only(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it refuses dense gradients: it then gets sparse ones, as Horovod gives it."""
    return isinstance(optimizer, torch.optim.SparseAdam)


def values(gradient: Tensor) -> Tensor:
    """The gradient itself, or the values that a sparse one has: in its memory."""
    return gradient._values() if gradient.is_sparse else gradient


@torch.no_grad()
def pack(bucket: Bucket, flat: Tensor) -> None:
    """Write a bucket's gradients into `flat`, zero where there is none; then whether there is each."""
    gradients, views = [], []
    for slot, there in zip(bucket.slots, flat[bucket.numel :], strict=True):
        gradient = slot.parameter.grad
        there.fill_(gradient is not None)
        if gradient is None:
            slot.view(flat).zero_()
        else:
            gradients.append(gradient.to_dense())  # itself, if it is dense
            views.append(slot.view(flat))
    if gradients:
        torch._foreach_copy_(views, gradients)


@torch.no_grad()
def unpack(bucket: Bucket, flat: Tensor, as_sparse: bool) -> None:
    """The mean of several ranks' :func:`pack` into the gradients; what no rank has stays as it is."""
    gradients, views = [], []
    for slot, there in zip(bucket.slots, flat[bucket.numel :].tolist(), strict=True):
        if there == 0:
            continue
        parameter = slot.parameter
        if as_sparse:
            parameter.grad = slot.view(flat).to(parameter.dtype).to_sparse(min(1, parameter.dim()))
            continue
        if parameter.grad is None or parameter.grad.is_sparse:
            parameter.grad = torch.empty_like(parameter)
        gradients.append(parameter.grad)
        views.append(slot.view(flat))
    if gradients:
        torch._foreach_copy_(gradients, views)


@dataclass
class NodeMean:
    """Some buckets' gradients on their way to their mean over a worker's ranks, in the background."""

    buckets: Sequence[Bucket]
    flats: Sequence[Tensor]
    """For each what :func:`pack` gave, and the mean once that is done: in one memory."""
    done: Future[None]

    @classmethod
    def begin(cls, communicator: Communicator, statistics: Statistics, buckets: Sequence[Bucket]) -> NodeMean:
        """All ranks of the worker begin the same buckets in the same order; one mean is taken at a time."""
        sizes, first = [bucket.numel + len(bucket.slots) for bucket in buckets], buckets[0]
        together = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        flats = torch.split(together, sizes)
        for bucket, flat in zip(buckets, flats, strict=True):
            pack(bucket, flat)
        statistics.node_bytes_sent += ring_bytes(communicator.node.size, together.nbytes)
        work = communicator.background(Channel.MEANS)
        done = work.submit(communicator.node.allreduce_mean, together, f"node.{first.index}")
        return cls(buckets, flats, done)


def average_on_node(
    communicator: Communicator, statistics: Statistics, layout: Layout, as_sparse: bool, apart: bool
) -> None:
    """Replace every gradient by the mean over a worker's ranks, in full precision. Collective over them.

    A rank without the gradient counts as zero, unless none has it. Buckets go as backward gets to them,
    `apart` or up to TOGETHER bytes in one mean, the next packed while one is averaged.
    """
    under_way: deque[NodeMean] = deque()

    def take() -> None:
        mean = under_way.popleft()
        mean.done.result()
        for bucket, flat in zip(mean.buckets, mean.flats, strict=True):
            unpack(bucket, flat, as_sparse)

    with statistics.phase("node"):
        for buckets in _chunks(layout, 0 if apart else TOGETHER):
            under_way.append(NodeMean.begin(communicator, statistics, buckets))
            if len(under_way) > 1:
                take()
        while under_way:
            take()


def _chunks(layout: Layout, most: int) -> list[list[Bucket]]:
    """The buckets, the last first, in runs of one dtype and device of at most so many bytes, or of one."""
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


def sparse_refused(name: str) -> TypeError:
    """The error for a sparse gradient where gradients are averaged."""
    return TypeError(
        f"the gradient of {name!r} is sparse, and where gradients are averaged (over a worker's ranks, or "
        "with feedback='none' and a dense compressor) they are dense: pass sparse_as_dense=True."
    )


@torch.no_grad()
def average_gradients(
    communicator: Communicator, statistics: Statistics, layout: Layout, as_sparse: bool
) -> None:
    """Replace every gradient by the workers' mean; one that is missing counts as zero. Collective.

    Means are dense, or `as_sparse` all. One worker's own sparse gradient stays as it is.
    """
    alone = communicator.workers == 1
    for bucket in layout.buckets:
        flat = bucket.new_flat()
        gradients, views = [], []
        for slot in bucket.slots:
            if slot.parameter.grad is None:
                slot.parameter.grad = torch.zeros_like(slot.parameter)
            if slot.parameter.grad.is_sparse and alone:
                continue
            slot.parameter.grad = slot.parameter.grad.to_dense()  # itself, if it is dense
            gradients.append(slot.parameter.grad)
            views.append(slot.view(flat))
        if not gradients:
            continue
        torch._foreach_copy_(views, gradients)
        wire = flat.to(bucket.compressor.wire_dtype(bucket.dtype))
        with statistics.phase("exchange"):
            communicator.allreduce_mean(wire, f"gradient.{bucket.index}")
        flat.copy_(wire)
        torch._foreach_copy_(gradients, views)
        if as_sparse and not alone:
            for slot in bucket.slots:
                if slot.parameter.grad is not None:  # by rows, as an Embedding's is
                    slot.parameter.grad = slot.parameter.grad.to_sparse(min(1, slot.parameter.dim()))
        statistics.dense_bytes_sent += ring_bytes(communicator.workers, wire.nbytes)
        statistics.ring_allreduce_bytes += ring_bytes(communicator.workers, 4 * bucket.numel)
