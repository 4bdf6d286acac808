"""Numbers that are no numbers any more, or nearly: in gradients, in their sums, and after the local step."""

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
    """What there is to say of them before the local step. Local; one pass, where there is nothing."""
    if kernels.squares_fit(gradients):
        return Word.NOTHING
    return Word.HUGE if kernels.all_finite(gradients) else Word.NONFINITE


def sums_fit(layout: Layout) -> bool:
    """Whether averaged gradients, finite before, still are: the same on all workers, so local."""
    narrow = [
        slot.parameter.grad
        for bucket in layout.buckets
        for slot in bucket.slots
        if bucket.compressor.wire_dtype(bucket.dtype) != bucket.dtype and slot.parameter.grad is not None
    ]
    return kernels.all_finite([values(gradient) for gradient in narrow])


def who_holds(communicator: Communicator, tensors: Mapping[str, Tensor], much: bool = False) -> str:
    """On which ranks which of these is not finite (or, if `much`, nearly); the first of each. Collective."""
    fits = kernels.squares_fit if much else kernels.all_finite
    everyone = communicator.allgather_object(
        [name for name, tensor in tensors.items() if not fits([tensor])][:1]
    )
    return ", ".join(f"{names[0]!r} on rank {rank}" for rank, names in enumerate(everyone) if names)


class StateCopy:
    """What a torch optimizer keeps, to be put back if its step goes wrong. Local."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._state = {
            parameter: {key: _copy(value) for key, value in kept.items()}
            for parameter, kept in optimizer.state.items()
        }

    def put_back(self) -> None:
        """As it was."""
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)

    def still_finite(self) -> bool:
        """Whether the optimizer keeps nothing that is not finite now."""
        return kernels.all_finite(list(_floats(self._optimizer.state.values())))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _floats(states: Iterable[Mapping[str, Any]]) -> Iterable[Tensor]:
    for state in states:
        for value in state.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                yield value
