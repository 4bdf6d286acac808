"""Ranks with different numbers of batches: how many steps all of them can take. Collective."""

from __future__ import annotations

import operator
from typing import Any

from hvd_saef.transport.find import find_communicator
from hvd_saef.transport.together import together


def common_steps(steps: int, process_set: Any = None) -> int:
    """The number of steps that every worker has data for: the least of all workers' `steps`. Collective.

    For ranks with different numbers of batches: step() is collective, so all must call it equally often.

    >>> steps = hvd_saef.common_steps(len(loader))
    >>> for batch in itertools.islice(loader, steps): ...

    Raises ValueError for `steps` below 0, TypeError for what is no whole number; WorkerError on the others.
    `process_set`: None is all ranks.
    """
    communicator, _ = find_communicator(process_set)
    return min(together(communicator, lambda: _whole(steps)))


def _whole(steps: int) -> int:
    whole = operator.index(steps)
    if whole < 0:
        raise ValueError(f"steps={steps!r}: a whole number >= 0 is allowed.")
    return whole
