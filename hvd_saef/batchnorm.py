"""Computes BatchNorm's running statistics at x, averaged over ranks. Collective."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hvd_saef.errors import ConfigurationMismatchError, who_has_what
from hvd_saef.round.owners import at_consensus
from hvd_saef.transport.communicator import Communicator
from hvd_saef.transport.find import find_communicator
from hvd_saef.transport.together import together


@torch.no_grad()
def recalibrate_batchnorm(
    model: nn.Module, loader: Iterable[Any], process_set: Any = None, process_group: Any = None
) -> None:
    """Recomputes the running means and variances of all BatchNorm layers, in place, at x, over all ranks.

    In training, a rank's statistics come from its own data at its worker's b. At x, where models are
    evaluated and saved, these statistics are slightly wrong, and they differ between ranks. After this call
    they are those at x and the same on all ranks: the mean is the mean of the ranks' means, and the variance
    is the mean of the ranks' variances plus the variance of their means. All batches of a rank have the same
    weight, and all ranks have the same weight.

    During the call all optimizers with parameters of `model` keep their parameters at x. `loader` gives this
    rank's batches, on the model's device: inputs, or tuples and lists that begin with inputs. The number of
    batches may differ between ranks. Collective over `process_set` or `process_group` (None: all ranks).

    If the loader or the model raises on one rank, all ranks raise (that rank its own exception, the others
    WorkerError), and the statistics are as before. Raises ConfigurationMismatchError if the ranks' models
    have different layers.
    """
    communicator, included = find_communicator(process_set, process_group)
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
    """Writes this rank's means over its batches, at x, into the layers' running statistics.

    Restores all modes and momenta afterwards. Local.
    """
    modes_of_modules = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in layers}
    try:
        with at_consensus(model.parameters()):
            model.eval()
            for layer in layers:
                layer.reset_running_stats()
                layer.train()
                layer.momentum = None  # None makes torch compute the plain mean over batches
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
