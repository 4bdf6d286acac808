"""Lines of a communicator: each optimizer talks on one of its own, so that no two get each other's payloads.

What an optimizer with overlap=True sends leaves when gradients are there, which differs between the ranks:
on a line that others use as well, one's payload would be taken for another's. A line goes back when its
optimizer is gone, and to the next one that is wrapped, once that is so on all ranks.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol


class Talks(Protocol):
    """What lines need of a communicator."""

    def allgather_object(self, value: Any) -> list[Any]:
        """Every rank's object, in rank order."""

    @property
    def idle(self) -> bool:
        """Whether its background threads have done all that they were given."""


@dataclass(eq=False)
class Lease:
    """One optimizer's right to a line, for as long as this object lives."""

    number: int
    lines: Lines
    parameters: frozenset[int]
    """The ids of its owner's, as they were wrapped."""
    under_way: Collection[Any] = field(default_factory=tuple)
    """What its owner has sent and not taken down; its length alone is looked at."""

    def used_by(self, communicator: Talks, under_way: Collection[Any]) -> None:
        """`communicator` is what talks on the line, and `under_way` what is on it."""
        self.lines.note(self.number, communicator)
        self.under_way = under_way


class Lines:
    """Which lines of one communicator are taken on this rank, and by whom."""

    def __init__(self, communicator: Talks) -> None:
        self._communicator = communicator
        self._leases: weakref.WeakValueDictionary[int, Lease] = weakref.WeakValueDictionary()
        self._talked: dict[int, Talks] = {}
        self._made = 0
        self.shared = False
        """Whether at the last wrapping there was another optimizer on any rank: the same on all of them."""

    def note(self, number: int, communicator: Talks) -> None:
        """`communicator` talks on the line: nobody else does before it is idle."""
        self._talked[number] = communicator

    def take(self, parameters: frozenset[int]) -> Lease:
        """The lowest line that is free on all ranks, else a new one. Collective.

        Whoever has any of these `parameters`, by id, is done, and counts for no other optimizer.

        Raises RuntimeError on all ranks if on any another optimizer has sent updates of a round that its
        step() has not completed.
        """
        if self._made:
            gc.collect()  # optimizers that nobody can reach may still be there, on some ranks
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
