"""Detects NaN, infinity and values near overflow: in gradients, in their sums, after the local step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.memory.layout import Layout
from hvd_saef.round.agreement import Word
from hvd_saef.round.gradients import values
from hvd_saef.transport.communicator import Communicator


def look_at_gradients(gradients: list[Tensor]) -> Word:
    """Returns NOTHING, HUGE or NONFINITE for the gradients before the local step. Local.

    NOTHING takes one pass over the gradients, the others two.
    """
    if kernels.squares_fit(gradients):
        return Word.NOTHING
    return Word.HUGE if kernels.all_finite(gradients) else Word.NONFINITE


def sums_fit(layout: Layout) -> bool:
    """Returns True if the averaged gradients, which were finite before, are still finite.

    Local: all workers have the same means, so all get the same result.
    """
    narrow = [
        slot.parameter.grad
        for bucket in layout.buckets
        for slot in bucket.slots
        if bucket.compressor.wire_dtype(bucket.dtype) != bucket.dtype and slot.parameter.grad is not None
    ]
    return kernels.all_finite([values(gradient) for gradient in narrow])


def who_holds(communicator: Communicator, tensors: Mapping[str, Tensor], much: bool = False) -> str:
    """Returns in words the first tensor on each rank that holds NaN or infinity; "" if none. Collective.

    With `much`, values near overflow count as well.
    """
    fits = kernels.squares_fit if much else kernels.all_finite
    everyone = communicator.allgather_object(
        [name for name, tensor in tensors.items() if not fits([tensor])][:1]
    )
    return ", ".join(f"{names[0]!r} on rank {rank}" for rank, names in enumerate(everyone) if names)


class StateCopy:
    """Copies a torch optimizer's state, so that a failed step can be undone. Local."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._state = {
            parameter: {key: _copy(value) for key, value in kept.items()}
            for parameter, kept in optimizer.state.items()
        }

    def put_back(self) -> None:
        """Restores the optimizer's state to what it was when the copy was made."""
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)

    def still_finite(self) -> bool:
        """Returns True if the optimizer's present state holds neither NaN nor infinity."""
        return kernels.all_finite(list(_floats(self._optimizer.state.values())))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _floats(states: Iterable[Mapping[str, Any]]) -> Iterable[Tensor]:
    for state in states:
        for value in state.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield value
