"""Running statistics of BatchNorm at x, averaged over workers. Collective."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hvd_saef.errors import ConfigurationMismatchError, who_has_what
from hvd_saef.round.model_hooks import at_consensus
from hvd_saef.transport.communicator import Communicator
from hvd_saef.transport.find import find_communicator
from hvd_saef.transport.together import together


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, loader: Iterable[Any], process_set: Any = None) -> None:
    """Collect the running means and variances of all BatchNorm layers anew, at x, over all workers.

    While training, a worker's statistics come from its own data at its own b, so at x, the point one
    evaluates and saves, they are a little off, and different on each worker. Afterwards they are x's,
    and the same on all workers: the mean of the workers' means, and the mean of their variances plus
    the variance of their means. Batches count equally, within a worker and between workers.

    All optimizers that have parameters of `model` hold theirs at x meanwhile. `loader` gives this worker's
    batches: inputs, or tuples and lists that begin with inputs, on the model's device; each rank may have its
    own number. Collective over `process_set` (None: all ranks).

    What a loader or the model raises on one rank, all raise (the others WorkerError), with the statistics as
    they were; ConfigurationMismatchError if the ranks' models have different layers.
    """
    communicator, included = find_communicator(process_set)
    layers: list[Any] = [layer for layer in model.modules() if _has_statistics(layer)]
    before = [{name: buffer.clone() for name, buffer in layer.named_buffers()} for layer in layers]

    def collect() -> list[int]:
        _collect(model, layers, loader)
        return [layer.running_mean.numel() for layer in layers]

    try:
        everyone = together(communicator, collect)
        if any(theirs != everyone[0] for theirs in everyone):
            raise ConfigurationMismatchError(
                f"workers disagree on the sizes of the model's BatchNorm layers: {who_has_what(everyone)}. "
                "Give the same model on all of them."
            )
    except Exception:
        for layer, buffers in zip(layers, before, strict=True):
            for name, buffer in layer.named_buffers():
                buffer.copy_(buffers[name])
        raise
    if included:
        for number, layer in enumerate(layers):
            _average(communicator, layer, number)


def _collect(model: nn.Module, layers: list[Any], loader: Iterable[Any]) -> None:
    """This rank's means over its batches, at x; all modes and momenta are as before afterwards."""
    modes_of_modules = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in layers}
    try:
        with at_consensus(model.parameters()):
            model.eval()
            for layer in layers:
                layer.reset_running_stats()
                layer.train()
                layer.momentum = None  # a plain mean over batches
            for batch in loader:
                model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    finally:
        for module, training in modes_of_modules.items():
            module.training = training
        for layer, momentum in momenta.items():
            layer.momentum = momentum


def _has_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None


def _average(communicator: Communicator, layer: Any, number: int) -> None:
    own = layer.running_mean.clone()
    communicator.allreduce_mean(layer.running_mean, f"batchnorm.{number}.mean")
    layer.running_var += (own - layer.running_mean) ** 2
    communicator.allreduce_mean(layer.running_var, f"batchnorm.{number}.variance")
