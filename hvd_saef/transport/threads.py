"""Communication between workers that are threads of one process: see hvd_saef.simulation.run_workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hvd_saef.errors import SaefError, StalledExchangeError
from hvd_saef.transport import streams
from hvd_saef.transport.communicator import Channel, Communicator, copy_pieces
from hvd_saef.transport.watch import LOOK, Patience, Stall


class Meeting:
    """A meeting point of some threads of a simulation: each brings a value, and each gets all values."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = ranks
        self._changed = threading.Condition()
        self._brought: dict[int, tuple[str, Any]] = {}
        self._seen: list[tuple[str, Any]] = []
        self._meetings = 0
        self._left: int | None = None
        self._patience = Patience.of_environment()
        self._stalled: StalledExchangeError | None = None

    def exchange(self, rank: int, operation: str, value: Any, doing: str = "at the start") -> list[Any]:
        """Returns the `value` of every rank, in rank order. Collective over the meeting's ranks.

        Raises SaefError if a rank has left or calls another operation, and StalledExchangeError if a rank
        does not come within the patience.
        """
        with self._changed:
            number = self._meetings
            self._brought[rank] = (operation, value)
            if len(self._brought) == len(self.ranks):
                self._seen = [self._brought[rank] for rank in self.ranks]
                self._brought = {}
                self._meetings += 1
                self._changed.notify_all()
            else:
                self._wait(number, rank, f"{operation}, {doing}")
            if self._stalled is not None:  # one thread made the error, and all that wait raise it
                raise self._stalled
            if self._meetings == number:
                raise SaefError(
                    f"worker {self._left} has ended, and worker {rank} waits for it in {operation}."
                )
            operations = [name for name, _ in self._seen]
            if len(set(operations)) > 1:
                raise SaefError(f"workers called different collectives at the same time: {operations}.")
            return [brought for _, brought in self._seen]

    def _wait(self, number: int, rank: int, what: str) -> None:
        """Waits until meeting `number` is complete, or can never be complete."""

        def over() -> bool:
            return self._meetings != number or self._left is not None or self._stalled is not None

        start, patience = time.monotonic(), self._patience
        if self._changed.wait_for(over, min(threading.TIMEOUT_MAX, patience.warning, patience.abort)):
            return
        stall = Stall(patience, rank, what)
        while not over():
            missing = [other for other in self.ranks if other not in self._brought]
            try:
                stall.look(time.monotonic() - start, missing, speaks=rank == min(self._brought))
            except StalledExchangeError as error:
                self._stalled = error
                self._changed.notify_all()
                return
            self._changed.wait_for(over, LOOK)
        if self._meetings != number:
            stall.over(time.monotonic() - start)

    def leave(self, rank: int) -> None:
        """Notes that worker `rank` will not come again, and wakes the threads that wait for it."""
        with self._changed:
            self._left = rank if self._left is None else self._left
            self._changed.notify_all()


class Meetings:
    """All meetings of one simulation. A meeting is made when the first of its threads asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[tuple[int, ...], int], dict[Channel, Meeting]] = {}
        self._left: list[int] = []

    def of(self, ranks: Sequence[int], line: int) -> Mapping[Channel, Meeting]:
        """Returns the meetings of these ranks on a line, one for each channel."""
        with self._lock:
            key = tuple(ranks), line
            meetings = self._known.get(key)
            if meetings is None:
                meetings = self._known[key] = {channel: Meeting(ranks) for channel in Channel}
                for rank in self._left:
                    self._leave(meetings, rank)
            return meetings

    def leave(self, rank: int) -> None:
        """Notes that `rank` will not come again to any of its meetings."""
        with self._lock:
            self._left.append(rank)
            for meetings in self._known.values():
                self._leave(meetings, rank)

    @staticmethod
    def _leave(meetings: Mapping[Channel, Meeting], rank: int) -> None:
        for meeting in meetings.values():
            if rank in meeting.ranks:
                meeting.leave(rank)


class ThreadCommunicator(Communicator):
    """The communicator of one thread of hvd_saef.simulation.run_workers with some of the other threads."""

    def __init__(
        self, meetings: Meetings, ranks: Sequence[int], own: int, hosts: list[list[int]], line: int = 0
    ) -> None:
        self.rank, self.size = list(ranks).index(own), len(ranks)
        self.ranks, self.hosts = ranks, hosts
        words = {Channel.WORDS: meetings.of(ranks, 0)[Channel.WORDS]}
        self._all_meetings, self._meetings = meetings, {**meetings.of(ranks, line), **words}
        self._own = own

    def part(self, ranks: Sequence[int]) -> Communicator:  # noqa: D102
        return ThreadCommunicator(self._all_meetings, ranks, self._own, [])

    def new_line(self, number: int) -> Communicator:  # noqa: D102
        return ThreadCommunicator(self._all_meetings, self.ranks, self._own, self.hosts, number)

    def find_hosts(self) -> list[list[int]]:  # noqa: D102
        return self.hosts

    def _meet(self, channel: Channel, operation: str, value: Any) -> list[Any]:
        doing = self.doing.get(channel, "at the start")
        return self._meetings[channel].exchange(self._own, operation, value, doing)

    @contextmanager
    def _shared(
        self, channel: Channel, operation: str, tensors: Sequence[Tensor]
    ) -> Iterator[list[list[Tensor]]]:
        """Yields copies of the `tensors` of every rank, in rank order, to be read within the context.

        On a GPU each thread has streams of its own, which the others do not know: so each waits until its
        copies can be read. It has then read those of the last meeting too, which keeps them until now.
        """
        copies = [tensor.detach().clone() for tensor in tensors]
        streams.of(tensors[0].device).so_far().wait()
        with torch.no_grad():
            yield self._meet(channel, operation, copies)

    def allgather(self, payload: Tensor, out: Sequence[Tensor], channel: Channel) -> None:  # noqa: D102
        with self._shared(channel, "allgather", [payload]) as everyone:
            copy_pieces([theirs for (theirs,) in everyone], out)

    def alltoall(self, pieces: Sequence[Tensor], out: Sequence[Tensor]) -> None:  # noqa: D102
        with self._shared(Channel.UP, "alltoall", pieces) as everyone:
            copy_pieces([theirs[self.rank] for theirs in everyone], out)

    def allreduce_mean(self, tensor: Tensor, name: str) -> None:  # noqa: D102
        with self._shared(Channel.MEANS, f"allreduce {name}", [tensor]) as everyone:
            total = everyone[0][0].clone()
            for (other,) in everyone[1:]:
                total += other
            tensor.copy_(total / self.size)

    def broadcast(self, tensor: Tensor, root: int) -> None:  # noqa: D102
        with self._shared(Channel.WORDS, "broadcast", [tensor]) as everyone:
            tensor.copy_(everyone[root][0])

    def allgather_object(self, value: Any) -> list[Any]:  # noqa: D102
        return self._meet(Channel.WORDS, "allgather_object", value)

    def combine(self, word: int) -> int:  # noqa: D102
        combined = 0
        for other in self._meet(Channel.WORDS, "combine", word):
            combined |= other
        return combined
