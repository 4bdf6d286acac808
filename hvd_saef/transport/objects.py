"""Objects on their way between ranks: pickled, and with the reason in its place if one cannot be pickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_saef.errors import WorkerError

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class _Unpickled:
    """The reason that a rank sends in place of an object that cannot be pickled."""

    reason: str


def exchange_objects(value: Any, gather: Callable[[Bytes], Sequence[Bytes]]) -> list[Any]:
    """Returns the objects of all ranks, in rank order. Collective.

    `gather` gets this rank's bytes, [n] uint8, and returns the bytes of all ranks. A rank whose `value`
    cannot be pickled raises pickle's error, and all other ranks raise WorkerError.
    """
    failure: Exception | None = None
    try:
        sent = pickle.dumps(value)
    except Exception as error:
        failure, sent = error, pickle.dumps(_Unpickled(f"{type(error).__name__}: {error}"))
    everyone = [pickle.loads(piece.data) for piece in gather(np.frombuffer(sent, np.uint8))]
    if failure is not None:
        raise failure
    unpickled = {rank: one.reason for rank, one in enumerate(everyone) if isinstance(one, _Unpickled)}
    if unpickled:
        raise WorkerError("; ".join(f"rank {rank} raised {why}" for rank, why in unpickled.items()))
    return everyone
