"""Horovod's synchronize() and skip_synchronize(): average gradients before a local step. Collective.

Gradients are averaged over the team, and also over all workers if nothing is compressed and nothing is fed
back (Horovod's arithmetic). In all other cases gradients stay local, and there is nothing to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hvd_saef.errors import NonFiniteUpdateError
from hvd_saef.round.exchange import Exchange
from hvd_saef.round.gradients import average_gradients, takes_sparse_only
from hvd_saef.round.overflow import sums_fit
from hvd_saef.round.parameters import Parameters


class Synchronization:
    """Averages the gradients of one optimizer once for each local step."""

    def __init__(self, exchange: Exchange, parameters: Parameters, inner: torch.optim.Optimizer) -> None:
        self._exchange = exchange
        self._parameters = parameters
        self._inner = inner
        self._skips = self._done = False

    @property
    def needed(self) -> bool:
        """True if gradients are averaged at all. Local."""
        return self._parameters.averages_gradients or self._exchange.communicator.team.size > 1

    def average(self) -> None:
        """Averages the gradients now; step() is then expected inside :meth:`skip`. Collective."""
        self._average()
        self._done = True

    @contextmanager
    def skip(self) -> Iterator[None]:
        """Lets step() inside the context average no gradients again. Local."""
        self._skips = True
        try:
            yield
        finally:
            self._skips = False

    def before_step(self) -> bool:
        """Averages the gradients, except inside :meth:`skip`. Collective.

        Returns False if all ranks must skip the step, since the sum over workers overflowed in float16.
        Raises NonFiniteUpdateError on all ranks instead, with on_nonfinite="raise".
        """
        if self._skips:
            return True
        if self._done:
            warnings.warn(
                "step() after synchronize() averages the gradients again: take it within "
                "`with optimizer.skip_synchronize():`.",
                stacklevel=4,
            )
        self._average()
        if self._parameters.averages_gradients and not sums_fit(self._parameters.layout):
            if self._exchange.settings.on_nonfinite == "raise":
                raise NonFiniteUpdateError(
                    "the sum of all workers' gradients overflowed in float16. The step was not taken "
                    "anywhere. Use Compression.none, or on_nonfinite='skip' to skip such steps."
                )
            return False
        return True

    def took_step(self) -> None:
        """Notes that a step used the averaged gradients. Local."""
        self._done = False

    def _average(self) -> None:
        layout, as_sparse = self._parameters.layout, takes_sparse_only(self._inner)
        communicator = self._exchange.communicator
        if communicator.team.size > 1:
            self._exchange.means.average(layout, as_sparse, apart=self._exchange.settings.overlap)
        if self._parameters.averages_gradients:
            average_gradients(communicator, self._exchange.statistics, layout, as_sparse)
