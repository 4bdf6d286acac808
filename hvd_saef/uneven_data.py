"""Finds the number of steps that ranks with different numbers of batches can all take. Collective."""

from __future__ import annotations

import operator
from typing import Any

from hvd_saef.transport.find import find_communicator
from hvd_saef.transport.together import together


def common_steps(steps: int, process_set: Any = None, process_group: Any = None) -> int:
    """Returns the least of all ranks' `steps`: the number of steps for which every rank has data.

    Use it for ranks with different numbers of batches: step() is collective, so all ranks must call it
    equally often.

    >>> steps = hvd_saef.common_steps(len(loader))
    >>> for batch in itertools.islice(loader, steps): ...

    Collective over `process_set` or `process_group` (None: all ranks). Raises ValueError for `steps` below
    0, TypeError for anything but a whole number; the other ranks then raise WorkerError.
    """
    communicator, _ = find_communicator(process_set, process_group)
    return min(together(communicator, lambda: _whole(steps)))


def _whole(steps: int) -> int:
    whole = operator.index(steps)
    if whole < 0:
        raise ValueError(f"steps={steps!r}: a whole number >= 0 is allowed.")
    return whole
