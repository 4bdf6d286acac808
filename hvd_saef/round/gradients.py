"""Prepares sparse gradients for the local step, and averages gradients over all workers."""

from __future__ import annotations

import torch
from torch import Tensor

from hvd_saef.memory.layout import Layout, is_gapless
from hvd_saef.round.statistics import Statistics, ring_bytes
from hvd_saef.transport.communicator import Communicator


def prepare_sparse(parameter: Tensor, optimizer: torch.optim.Optimizer, as_dense: bool) -> None:
    """Replaces a sparse gradient by a dense one, or by a coalesced one (one value per index). Local.

    It becomes dense only `as_dense`, and only if the optimizer accepts dense gradients.
    """
    gradient = parameter.grad
    if gradient is None or not gradient.is_sparse:
        return
    if as_dense and not takes_sparse_only(optimizer):
        parameter.grad = gradient.to_dense()
    else:  # the sum of one index's values may overflow, so later checks must see the sum
        parameter.grad = gradient.coalesce()


def takes_sparse_only(optimizer: torch.optim.Optimizer) -> bool:
    """Returns True if the optimizer refuses dense gradients; it then gets sparse ones, as with Horovod."""
    return isinstance(optimizer, torch.optim.SparseAdam)


def values(gradient: Tensor) -> Tensor:
    """Returns the gradient itself, or the values of a sparse gradient: a view, no copy."""
    return gradient._values() if gradient.is_sparse else gradient


def writable(gradient: Tensor) -> Tensor:
    """Returns a dense tensor to which a mean can be written: a copy if `gradient` is sparse or expanded.

    Otherwise it returns the gradient itself.
    """
    return gradient if not gradient.is_sparse and is_gapless(gradient) else gradient.to_dense().clone()


def sparse_refused(name: str) -> TypeError:
    """Returns the error for a sparse gradient of parameter `name` where gradients are averaged."""
    return TypeError(
        f"the gradient of {name!r} is sparse, and where gradients are averaged (over a worker's ranks, or "
        "with feedback='none' and a dense compressor) they are dense: pass sparse_as_dense=True."
    )


@torch.no_grad()
def average_gradients(
    communicator: Communicator, statistics: Statistics, layout: Layout, as_sparse: bool
) -> None:
    """Replaces every gradient by its mean over the workers; a missing gradient counts as zero. Collective.

    The means are dense tensors, or all sparse with `as_sparse`. If there is only one worker, its sparse
    gradients stay unchanged.
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
        with statistics.phase("exchange", bucket.device):
            communicator.allreduce_mean(wire, f"gradient.{bucket.index}")
        flat.copy_(wire)
        torch._foreach_copy_(gradients, views)
        if as_sparse and not alone:
            for slot in bucket.slots:
                if slot.parameter.grad is not None:  # sparse in the rows, like an Embedding's gradient
                    slot.parameter.grad = slot.parameter.grad.to_sparse(min(1, slot.parameter.dim()))
        statistics.dense_bytes_sent += ring_bytes(communicator.workers, wire.nbytes)
        statistics.ring_allreduce_bytes += ring_bytes(communicator.workers, 4 * bucket.numel)
