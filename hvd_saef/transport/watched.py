"""What communicators between processes have in common: a watch over their waits, and a line of their own."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence

from hvd_saef.transport.communicator import Channel, Communicator, SoloCommunicator
from hvd_saef.transport.watch import Watch

PAYLOADS: Mapping[Channel, str] = {
    Channel.UP: "payloads to the server",
    Channel.DOWN: "the server's answers",
}
"""What travels on a channel of payloads, in words."""


class WatchedCommunicator(Communicator):
    """A communicator between processes, whose `_watch` looks after every wait for other ranks."""

    _watch: Watch
    _line: int = 0

    def part(self, ranks: Sequence[int]) -> Communicator:  # noqa: D102
        if len(ranks) == 1:
            return SoloCommunicator()
        key = tuple(self.ranks[rank] for rank in ranks), tuple(ranks)
        if key not in self.kin:
            self.kin[key] = self.new_part(*key)
        return self.kin[key]

    @abc.abstractmethod
    def new_part(self, ranks: Sequence[int], names: Sequence[int]) -> Communicator:
        """Makes the communicator of `ranks` of the job, which messages call `names`.

        Only :meth:`part` calls this. Collective over these ranks.
        """

    def _wait_until(self, done: Callable[[], bool], channel: Channel, operation: str) -> None:
        """Waits, under the watch, until an operation on a channel is done."""
        doing = self.doing.get(Channel.WORDS if channel is Channel.MEANS else channel, "at the start")
        self._watch.wait(done, self._name(channel), f"{operation}, {doing}")

    def _name(self, channel: Channel) -> str:
        """Returns the watch's name of the channel on this line. WORDS is the same on all lines."""
        return channel.name if self._line == 0 or channel is Channel.WORDS else f"{channel.name} {self._line}"
