"""How a collective call begins: each rank prepares its part, and all of them go on, or none does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hvd_saef.errors import WorkerError
from hvd_saef.transport.communicator import Communicator

T = TypeVar("T")


def together(communicator: Communicator, prepare: Callable[[], T]) -> list[T]:
    """What `prepare` returns on every rank, in rank order; with it any collective call begins. Collective.

    If it raises on any rank, all raise: that one its own exception, the others WorkerError.
    """
    outcome: T | None = None
    failure: Exception | None = None
    try:
        outcome = prepare()
    except Exception as error:
        failure = error
    told: list[tuple[str | None, Any]] = communicator.allgather_object((in_words(failure), outcome))
    if failure is not None:
        raise failure
    if any(reason for reason, _ in told):
        raise WorkerError(who_raised([reason for reason, _ in told]))
    return [theirs for _, theirs in told]


def in_words(failure: Exception | None) -> str | None:
    """What others are told of a failure."""
    return None if failure is None else f"{type(failure).__name__}: {failure}"


def who_raised(told: Sequence[str | None]) -> str:
    """Of all ranks' :func:`in_words`, by rank."""
    return "; ".join(f"rank {rank} raised {why}" for rank, why in enumerate(told) if why)
