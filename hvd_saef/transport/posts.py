"""The messages by which waiting ranks tell each other where they are, which the watch sends and reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

TAG = 23279


@dataclass
class Call:
    """The call that a rank has reached on one channel: its number there, from 1, and its description."""

    number: int
    what: str


@dataclass
class Message:
    """What one rank tells others: that it waits in a call, or that it ends."""

    rank: int
    waits: Mapping[str, Call]
    """The calls in which the rank waits for others, by channel."""
    ended: Mapping[str, int] | None = None
    """The number of the last call on each channel, if the rank ends; it makes no further call."""


class Post(Protocol):
    """Carries messages between ranks. Local: sending and looking wait for nobody."""

    @property
    def lost(self) -> str:
        """Why messages can no longer be read, as a sentence for the user; "" as long as they can."""

    def tell(self, message: Message, ranks: Sequence[int]) -> None:
        """Sends the message to `ranks`."""

    def hear(self) -> Iterable[Message]:
        """Yields the messages that have arrived since the last call."""

    def tidy(self) -> bool:
        """Returns True if messages pile up until they are heard, and some may have arrived."""


class MpiPost:
    """Messages between the ranks of an mpi4py communicator, on which only this post sends."""

    lost = ""

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._under_way: list[Any] = []

    def tell(self, message: Message, ranks: Sequence[int]) -> None:  # noqa: D102
        self._under_way = [request for request in self._under_way if not request.Test()]
        self._under_way += [self._mpi.isend(message, dest=rank, tag=TAG) for rank in ranks]

    def hear(self) -> Iterable[Message]:  # noqa: D102
        while (message := self._mpi.improbe(tag=TAG)) is not None:
            yield message.recv()

    def tidy(self) -> bool:  # noqa: D102
        return bool(self._mpi.Iprobe(tag=TAG))
