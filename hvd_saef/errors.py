"""The errors that can happen while workers train together.

Every error here except StalledExchangeError is raised on all workers in the same step. x, the errors e and s,
and the optimizer's state are then as before that step, unless the error's description says otherwise. Wrong
arguments raise ValueError or TypeError on the ranks that pass them; if the call is collective, the other
ranks raise WorkerError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SaefError(RuntimeError):
    """Base class of every error that concerns more than one worker."""


class ConfigurationMismatchError(SaefError):
    """Workers were set up differently. The message names the first difference and the ranks' values."""


class NonFiniteUpdateError(SaefError):
    """A gradient holds a NaN or an infinity, or the local step made one.

    The message names the parameter and the rank. If the local step made the NaN or infinity, the parameters
    are back at the start of the round, and the optimizer's own state keeps the step. Only if the square of a
    gradient was infinite, the optimizer's own state is as before the step, too.
    """


class ConsensusError(SaefError):
    """x differs between workers. The message names the parameter and the ranks."""


class WorkerError(SaefError):
    """Another rank raised an exception. The message names that rank and repeats the exception's message."""


class ExchangeError(SaefError):
    """A compressor raised an exception within an exchange, or memory was lacking.

    The message names the rank and the reason. Afterwards x and the errors may differ between workers, so no
    step is taken before all ranks have loaded a checkpoint or called reanchor().
    """


class StalledExchangeError(SaefError):
    """A rank did not arrive where others wait. Only the waiting ranks raise this error.

    The message names the missing rank and the call that waits for it. The communicator cannot be used
    afterwards. If nothing catches the error, MPI ends the job.
    """


class CheckpointError(SaefError):
    """A checkpoint could not be written or read. The message names the file and the reason."""


def who_has_what(values: Sequence[Any], whose: Sequence[int] | None = None) -> str:
    """Returns a text that says which ranks have which value.

    values[i] belongs to rank whose[i], or to rank i without `whose`.
    """
    ranks: dict[str, list[int]] = {}
    for rank, value in zip(range(len(values)) if whose is None else whose, values, strict=True):
        ranks.setdefault(repr(value), []).append(rank)
    return ", ".join(
        f"{value} on rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}"
        for value, who in ranks.items()
    )
