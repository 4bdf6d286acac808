"""Methods by the paper's names: "SGDM", "EF-SignSGDM-DC", "SAEF-SGDM-DC-TopK1% p=16", ours with "beta=1"."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import hvd_saef

NAME = re.compile(
    r"(?:(?P<feedback>EF|SAEF|Local|GradientEF)-)?(?P<sign>Sign)?(?P<optimizer>SGDM|SGD|AdamW)"
    r"(?:-(?P<ways>SC|DC))?(?:-TopK(?P<percent>[0-9.]+)%)?"
)
OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "p": ("averaging_period", int),
    "alpha": ("step_ahead", float),
    "beta": ("server_step_ahead", float),
    "H": ("local_steps", int),
}
"""By name in a method's string: the argument of `hvd_saef.DistributedOptimizer`, and its type."""


@dataclass(frozen=True)
class Method:
    """What :func:`parse` found in a name."""

    name: str
    optimizer: str
    """"SGD", "SGDM" or "AdamW"."""
    arguments: tuple[tuple[str, Any], ...]
    """Of `hvd_saef.DistributedOptimizer`."""
    rate: float = 1.0
    """What the learning rate is multiplied by."""
    gradients: hvd_saef.Compressor | None = None
    """What compresses gradients, with error feedback, before the optimizer sees their mean."""

    @property
    def feeds_back(self) -> bool:
        """Whether there are errors, and so an auxiliary point x̃ other than x."""
        return bool(dict(self.arguments)["feedback"] != "none")

    @property
    def local_steps(self) -> int:
        """H."""
        return int(dict(self.arguments).get("local_steps", 1))

    def wrap(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
        """The distributed optimizer. Collective."""
        if self.gradients:
            feed_back_gradients(model, self.gradients)
        return hvd_saef.DistributedOptimizer(
            optimizer, named_parameters=model.named_parameters(), model=model, **dict(self.arguments)
        )


def parse(text: str) -> Method:
    """A method from its name and options, such as "SAEF-SignSGDM-DC p=16 beta=1".

    The name is [EF-|SAEF-|Local-] [Sign](SGD|SGDM|AdamW) [-SC|-DC] [-TopK<percent>%]. Without a
    compressor it is full precision on the mean gradient; "Local-" averages the workers' own updates
    uncompressed (C is the identity), and "GradientEF-" compresses gradients instead of updates (see
    :func:`feed_back_gradients`; SC only). Options: p, alpha, beta, H, and rate, a factor on the learning
    rate. Raises ValueError for anything else.
    """
    name, *options = text.split()
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"method {text!r}: {name!r} is no name such as SGDM, EF-SignSGDM-DC, SAEF-SGD-SC-TopK1%"
        )
    feedback, sign, percent, ways = match["feedback"], match["sign"], match["percent"], match["ways"]
    compressed = bool(sign or percent)
    if bool(sign) and bool(percent):
        raise ValueError(f"method {text!r}: either Sign or TopK")
    if compressed != bool(ways) or (compressed and feedback == "Local"):
        raise ValueError(
            f"method {text!r}: -SC or -DC goes with a compressor, Sign or TopK, and not with Local"
        )
    if feedback in ("EF", "SAEF", "GradientEF") and not compressed:
        raise ValueError(f"method {text!r}: {feedback} needs a compressor, Sign or TopK")
    on_gradients = feedback == "GradientEF"
    if on_gradients and ways == "DC":
        raise ValueError(f"method {text!r}: GradientEF goes with -SC")
    arguments: dict[str, Any] = {
        "feedback": {"EF": "ef", "SAEF": "saef", "Local": "ef"}.get(feedback, "none")
    }
    compressor = (
        hvd_saef.Compression.topk(float(percent) / 100)
        if percent
        else hvd_saef.Compression.sign
        if sign
        else hvd_saef.Compression.none
    )
    if compressed and not on_gradients:
        arguments["double_compression"] = ways == "DC"
    arguments["compression"] = hvd_saef.Compression.none if on_gradients else compressor
    rate = 1.0
    for option in options:
        key, _, value = option.partition("=")
        if key == "rate":
            rate = float(value)
        elif key in OPTIONS:
            argument, kind = OPTIONS[key]
            arguments[argument] = kind(value)
        else:
            raise ValueError(f"method {text!r}: {option!r} is none of {', '.join(OPTIONS)}, rate")
    return Method(
        text, match["optimizer"], tuple(arguments.items()), rate, compressor if on_gradients else None
    )


def feed_back_gradients(model: nn.Module, compressor: hvd_saef.Compressor) -> None:
    """From now on each gradient that a backward pass ends with is C(gradient + error), a block a tensor.

    What C leaves out is the next pass's error. The control for adaptive optimizers: their second moments
    then see compressed gradients. These still travel dense, so bytes are not what they would be. Errors
    are buffers of the model, so that checkpoints have them. One backward pass a step.
    """

    @torch.no_grad()
    def compress(parameter: nn.Parameter) -> None:
        gradient, error = parameter.grad, errors[parameter]
        if gradient is not None:
            error += gradient
            gradient.copy_(compressor.apply(error))
            error -= gradient

    errors = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
    for number, (parameter, error) in enumerate(errors.items()):
        model.register_buffer(f"gradient_error_{number}", error)
        parameter.register_post_accumulate_grad_hook(compress)
