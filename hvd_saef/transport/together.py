"""The beginning of a collective call: each rank prepares its part, and either all ranks go on or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hvd_saef.errors import WorkerError
from hvd_saef.transport.communicator import Communicator

T = TypeVar("T")


def together(communicator: Communicator, prepare: Callable[[], T]) -> list[T]:
    """Returns the results of `prepare` on all ranks, in rank order, as the beginning of a collective call.

    If `prepare` raises on any rank, all ranks raise: that rank its own exception, the others WorkerError.
    Collective.
    """
    failure, reasons, outcomes = attempted(communicator, prepare, in_words)
    if failure is not None:
        raise failure
    if any(reasons):
        raise WorkerError(who_raised(reasons))
    return outcomes


def attempted(
    communicator: Communicator, do: Callable[[], T], words: Callable[[Exception | None], str | None]
) -> tuple[Exception | None, list[str | None], list[T]]:
    """Calls `do`, and tells all ranks what came of it. Collective.

    Returns this rank's exception or None; every rank's exception, in the words of `words`, or None; and
    what `do` returned on every rank, where None stands for an exception.
    """
    outcome: T | None = None
    failure: Exception | None = None
    try:
        outcome = do()
    except Exception as error:
        failure = error
    told: list[tuple[str | None, Any]] = communicator.allgather_object((words(failure), outcome))
    return failure, [reason for reason, _ in told], [theirs for _, theirs in told]


def in_words(failure: Exception | None) -> str | None:
    """Returns the text by which other ranks learn of a failure; None if there is none."""
    return None if failure is None else f"{type(failure).__name__}: {failure}"


def who_raised(told: Sequence[str | None]) -> str:
    """Joins the failures of all ranks, each in the words of :func:`in_words`, into one message."""
    return "; ".join(f"rank {rank} raised {why}" for rank, why in enumerate(told) if why)
