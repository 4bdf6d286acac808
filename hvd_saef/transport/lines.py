"""Lines of a communicator: each optimizer has its own line, so that no two get each other's payloads.

With overlap=True an optimizer sends payloads as soon as gradients are complete, and that order differs
between ranks. On a line that two optimizers share, the payload of one could be taken for that of the other.
A line is free again when its optimizer is gone on all ranks; the next optimizer that is wrapped may take it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol


class Talks(Protocol):
    """The part of a communicator that lines need."""

    def allgather_object(self, value: Any) -> list[Any]:
        """Returns the objects of all ranks, in rank order. Collective."""

    @property
    def idle(self) -> bool:
        """True if the background threads have done all submitted work. Local."""


@dataclass(eq=False)
class Lease:
    """The right of one optimizer to a line, for as long as this object lives."""

    number: int
    lines: Lines
    parameters: frozenset[int]
    """The ids of the owner's parameters when the owner was wrapped."""
    under_way: Collection[Any] = field(default_factory=tuple)
    """The updates that the owner has sent and not completed; only their number is used."""

    def used_by(self, communicator: Talks, under_way: Collection[Any]) -> None:
        """Notes that `communicator` uses the line, and that `under_way` holds the updates sent on it."""
        self.lines.note(self.number, communicator)
        self.under_way = under_way


class Lines:
    """The record of the lines of one communicator that are taken on this rank, and of their owners."""

    def __init__(self, communicator: Talks) -> None:
        self._communicator = communicator
        self._leases: weakref.WeakValueDictionary[int, Lease] = weakref.WeakValueDictionary()
        self._talked: dict[int, Talks] = {}
        self._made = 0
        self.shared = False
        """True if any rank had another optimizer at the last wrapping. The value is the same on all ranks."""

    def note(self, number: int, communicator: Talks) -> None:
        """Notes that `communicator` uses the line, which is not free before `communicator` is idle."""
        self._talked[number] = communicator

    def take(self, parameters: frozenset[int]) -> Lease:
        """Returns a lease of the lowest line that is free on all ranks, or of a new line. Collective.

        `parameters` are the ids of the new optimizer's parameters. An earlier optimizer with any of these
        parameters is replaced by the new one, so it does not count as another optimizer.

        Raises RuntimeError on all ranks if another optimizer of any rank has sent updates of a round that its
        step() has not completed.
        """
        if self._made:
            gc.collect()  # unreachable optimizers may still exist on some ranks
        leases = dict(self._leases)
        taken = [n for n in range(self._made) if n in leases or not self._is_idle(n)]
        others = [lease for lease in leases.values() if not lease.parameters & parameters]
        sent = any(len(lease.under_way) for lease in others)
        everyone = self._communicator.allgather_object((taken, bool(others), sent))
        if any(theirs for _, _, theirs in everyone):
            raise RuntimeError(
                "an optimizer was wrapped between backward and step() of another one, when overlap=True had "
                "sent updates already: call hvd_saef.DistributedOptimizer before the forward pass."
            )
        everywhere = {n for theirs, _, _ in everyone for n in theirs}
        self.shared = any(theirs for _, theirs, _ in everyone)
        number = min(set(range(self._made + 1)) - everywhere)
        self._made = max(self._made, number + 1)
        lease = self._leases[number] = Lease(number, self, parameters)
        return lease

    def _is_idle(self, number: int) -> bool:
        return number not in self._talked or self._talked[number].idle
