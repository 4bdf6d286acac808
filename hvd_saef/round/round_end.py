"""The end of a round: the exchange, and the checks and reports of all workers around it. Collective."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvd_saef.errors import ConsensusError
from hvd_saef.round.agreement import (
    Word,
    agree,
    check_consensus,
    check_workers,
    raise_broken,
    raise_failure,
    state_of,
)
from hvd_saef.round.exchange import Exchange
from hvd_saef.round.modes import Modes
from hvd_saef.round.origin import Origin
from hvd_saef.round.overlap import NoOverlap, Overlap
from hvd_saef.round.parameters import Parameters


class RoundEnd:
    """Completes the rounds of one optimizer, `inner`."""

    def __init__(
        self,
        exchange: Exchange,
        modes: Modes,
        origin: Origin,
        overlap: Overlap | NoOverlap,
        parameters: Parameters,
        inner: torch.optim.Optimizer,
    ) -> None:
        self._exchange = exchange
        self._communicator, self._settings = exchange.communicator, exchange.settings
        self._statistics = exchange.statistics
        self._modes = modes
        self._origin = origin
        self._overlap = overlap
        self._parameters = parameters
        self._inner = inner
        self.before_exchange: list[Callable[[], None]] = []
        """Functions that all ranks call between a round's last local step and its exchange.

        They may be collective.
        """

    def complete(self) -> None:
        """Exchanges the updates of the local steps of this round, and begins the next one. Collective.

        Raises on all ranks if the exchange or a function of `before_exchange` failed on any. On the rounds of
        check_consensus_every, it raises ConsensusError if x, or a worker's state, differs between ranks.
        """
        evaluating = self._modes.evaluating
        self._modes.train()
        failure = self._look()
        self._origin.forget_consolidation()
        if self._modes.state is not None:
            self._exchange.complete_round(self._modes.state)
        self._overlap.disarm()
        if evaluating:
            self._modes.eval()
        self._end_round(failure)
        every = self._settings.check_consensus_every
        if every and self._modes.progress.rounds % every == 0:
            with self._statistics.phase("agreement"):
                x = self._origin.x(self._parameters.layout)
                check_consensus(self._communicator, x, "Call optimizer.reanchor() to go on from rank 0's.")
                self.check_worker(
                    "Gradients are averaged over them, so something else changed on one: a learning rate, a "
                    "gradient between synchronize() and step(), or memory. Load a checkpoint."
                )

    def _look(self) -> Exception | None:
        """Calls the functions of `before_exchange`, and returns the first exception that one raises."""
        try:
            for look in self.before_exchange:
                look()
        except Exception as failure:
            return failure
        return None

    def _end_round(self, failure: Exception | None) -> None:
        """Raises on all ranks if the exchange or `before_exchange` failed on any rank. Collective."""
        if self._modes.state is None or not self._modes.state.buckets:
            return
        broken = self._exchange.take_failure()
        failure = broken or failure
        with self._statistics.phase("agreement"):
            combined = agree(self._communicator, Word.BROKEN if broken else Word.NOTHING, failure)
        if Word.BROKEN in combined:
            self._origin.broke()
            raise_broken(self._communicator, failure)
        if Word.FAILED in combined:
            raise_failure(self._communicator, failure)

    def check_worker(self, advice: str) -> None:
        """Raises ConsensusError on all ranks if the ranks of a team hold different states. Collective."""
        own = {} if self._modes.state is None else self._modes.state.own()
        try:
            check_workers(self._communicator, own | state_of(self._inner, self._parameters.layout), advice)
        except ConsensusError:
            self._origin.forget_agreement()
            raise
