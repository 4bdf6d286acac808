"""Refuses to become part of a CUDA graph. Local."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hvd_saef.transport import streams


def refuse_capture(devices: Iterable[torch.device], what: str) -> None:
    """Raises RuntimeError if this thread's work on any of the devices is captured into a CUDA graph now.

    `what` is the sentence's subject, in words.
    """
    if any(streams.of(device).is_captured() for device in devices):
        raise RuntimeError(
            f"{what} cannot be captured into a CUDA graph: workers meet through the host, which a graph does "
            "not replay. Capture the forward and backward passes alone, with overlap=False "
            "(torch.cuda.make_graphed_callables, or torch.cuda.graph around them), and call step() after "
            "each replay()."
        )
