"""What can go wrong while workers train together.

Every error here but StalledExchangeError is raised on all workers in the same step, with x, the errors and
the optimizer's state as they were before it, unless it says otherwise. Wrong arguments are ValueError and
TypeError, raised where they are given; in a collective call, the other ranks raise WorkerError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SaefError(RuntimeError):
    """Base class of every error that concerns more than one worker."""


class ConfigurationMismatchError(SaefError):
    """Workers were set up differently; names the first difference and which ranks have what."""


class NonFiniteUpdateError(SaefError):
    """A gradient holds a NaN or an infinity, or the local step made one; names the parameter and the rank.

    After the latter the parameters are where the round began, and the optimizer's own state has taken the
    step, unless a gradient's square was infinite: then that is as before, too.
    """


class ConsensusError(SaefError):
    """x differs between workers; names the parameter and the ranks."""


class WorkerError(SaefError):
    """Another worker raised an exception; names its rank and repeats its message."""


class ExchangeError(SaefError):
    """A compressor raised an exception within an exchange, or memory was lacking; names rank and reason.

    x and the errors may differ between the workers afterwards: no step is taken before all ranks have
    loaded a checkpoint, or called reanchor().
    """


class StalledExchangeError(SaefError):
    """A rank did not arrive where others wait; names it, and what for. Raised on those who wait alone.

    The communicator cannot be used after it. If nobody catches it, MPI ends the job.
    """


class CheckpointError(SaefError):
    """A checkpoint could not be written or read; names the file and the reason."""


def who_has_what(values: Sequence[Any], whose: Sequence[int] | None = None) -> str:
    """Which ranks have which value, in words; values[i] is rank whose[i]'s, or rank i's."""
    ranks: dict[str, list[int]] = {}
    for rank, value in zip(range(len(values)) if whose is None else whose, values, strict=True):
        ranks.setdefault(repr(value), []).append(rank)
    return ", ".join(
        f"{value} on rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}"
        for value, who in ranks.items()
    )
