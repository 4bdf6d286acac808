"""Gradients: sparse ones made ready for the local step; and their means over all workers."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_saef.memory.layout import Layout, is_gapless
from hvd_saef.round.statistics import Statistics, ring_bytes
from hvd_saef.transport.communicator import Communicator


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


def writable(gradient: Tensor) -> Tensor:
    """The gradient itself, or what a mean can be written to where it is sparse or expanded."""
    return gradient if not gradient.is_sparse and is_gapless(gradient) else gradient.to_dense().clone()


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
            slot.parameter.grad = writable(slot.parameter.grad)
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
