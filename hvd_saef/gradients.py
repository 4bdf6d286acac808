"""Gradients: sparse ones made ready for the local step; and their means, over a node or all workers."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_saef.communicator import Communicator
from hvd_saef.layout import Bucket, Layout
from hvd_saef.statistics import Statistics, ring_bytes


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
def pack(bucket: Bucket) -> Tensor:
    """A bucket's gradients in x's dtype, zero where there is none, and for each slot whether there is one."""
    flat = torch.empty(bucket.numel + len(bucket.slots), dtype=bucket.dtype, device=bucket.device)
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
    return flat


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


def average_on_node(node: Communicator, statistics: Statistics, layout: Layout, as_sparse: bool) -> None:
    """Replace every gradient by the mean over a worker's ranks, in full precision. Collective over them.

    A rank without the gradient counts as zero, unless none has it. Buckets go as backward gets to them.
    """
    for bucket in reversed(layout.buckets):
        if bucket.numel:
            with statistics.phase("node"):
                flat = pack(bucket)
                node.allreduce_mean(flat, name_on_node(bucket))
                unpack(bucket, flat, as_sparse)
            statistics.node_bytes_sent += ring_bytes(node.size, flat.nbytes)


def name_on_node(bucket: Bucket) -> str:
    """What the mean of a bucket's gradients over a node is called."""
    return f"node.{bucket.index}"


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
