"""Workers of several ranks (teams): full precision is exchanged inside a team, payloads between teams.

All ranks of a team hold the same bits of x, e, s and the optimizer's state, and so the same payload. Each
rank sends its slice of the payload to the ranks at the same place in the other teams, which are its lane. The
team then puts the slices together. All lanes of a team together send the bytes of one payload.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hvd_saef.errors import ConfigurationMismatchError, who_has_what
from hvd_saef.settings import Settings
from hvd_saef.transport.communicator import Channel, Communicator, copy_pieces
from hvd_saef.transport.libraries import horovod
from hvd_saef.transport.process_sets import lanes, register
from hvd_saef.transport.together import together


def find_workers(everyone: Communicator, settings: Settings) -> Communicator:
    """Returns a communicator whose workers are those of the settings. Collective over `everyone`.

    Raises ValueError if the workers are not a partition of the ranks of `everyone`, differ in size without
    weights="ranks", or have no process sets in Horovod; ConfigurationMismatchError if ranks ask for different
    workers.
    """
    groups, weights = settings.worker, settings.weights
    asked = everyone.allgather_object((groups, weights))
    for name, values in (("worker", [a for a, _ in asked]), ("weights", [b for _, b in asked])):
        if len(set(map(repr, values))) > 1:
            raise ConfigurationMismatchError(
                f"workers disagree on {name}: {who_has_what(values)}. Make it the same on all of them."
            )
    if groups == "rank":
        return everyone
    if isinstance(groups, str):
        found = everyone.find_hosts()
    else:
        numbers = {rank: number for number, rank in enumerate(everyone.ranks)}
        if sorted(rank for group in groups for rank in group) != sorted(numbers):
            raise ValueError(f"worker={groups}: each of the ranks {sorted(numbers)} is allowed, once.")
        found = [[numbers[rank] for rank in group] for group in groups]
    sizes = [len(group) for group in found]
    if len(set(sizes)) > 1 and weights != "ranks":
        raise ValueError(
            f"worker={groups!r}: the workers have {sizes} ranks; the same number each is allowed, or pass "
            "weights='ranks' for a mean that is weighted by them."
        )
    if set(sizes) == {1}:
        return everyone
    key = repr(found), weights
    teams = everyone.kin.get(key)
    if not isinstance(teams, TeamCommunicator):
        teams = everyone.kin[key] = TeamCommunicator.of(everyone, found, by_ranks=weights == "ranks")
    teams.find_process_sets()
    return teams


class TeamCommunicator(Communicator):
    """A communicator whose workers are the `groups` of the ranks of `everyone`.

    `team` and `lane` are the communicators of this rank's team and lane; a rank may have no lane (None). With
    `by_ranks` a worker's weight in means over workers is its number of ranks, else all weights are equal.
    """

    def __init__(
        self,
        everyone: Communicator,
        groups: Sequence[Sequence[int]],
        by_ranks: bool,
        team: Communicator,
        lane: Communicator | None,
    ) -> None:
        self.rank, self.size, self.ranks = everyone.rank, everyone.size, everyone.ranks
        self._everyone, self._groups, self._by_ranks = everyone, groups, by_ranks
        self._worker = next(k for k, group in enumerate(groups) if self.rank in group)
        self._place, self._lanes = groups[self._worker].index(self.rank), len(lanes(groups))
        self._counts = [len(group) if by_ranks else 1 for group in groups]
        self._team, self._lane = team, lane
        for part in (self, team, lane):
            if part is not None:
                part.doing = everyone.doing

    @classmethod
    def of(cls, everyone: Communicator, groups: Sequence[Sequence[int]], by_ranks: bool) -> TeamCommunicator:
        """Makes the communicator of these groups, with its team and lane. Collective over `everyone`."""
        mine = next(group for group in groups if everyone.rank in group)
        team = everyone.part(mine)
        # If a team has more ranks than the smallest team, its last ranks have no lane.
        lane = next((everyone.part(ranks) for ranks in lanes(groups) if everyone.rank in ranks), None)
        return cls(everyone, groups, by_ranks, team, lane)

    def new_line(self, number: int) -> Communicator:  # noqa: D102
        lane = None if self._lane is None else self._lane.line(number)
        everyone, team = self._everyone.line(number), self._team.line(number)
        return TeamCommunicator(everyone, self._groups, self._by_ranks, team, lane)

    def find_process_sets(self) -> None:
        """Finds the current process sets of team and lane, since users may remove and add sets.

        Collective over all ranks. Raises ValueError on a rank where Horovod does not know them, and
        WorkerError on the others.
        """
        everyone = self._everyone
        if everyone.process_set is None:
            return
        groups = [[self.ranks[rank] for rank in group] for group in self._groups]

        def find() -> None:
            known = register(groups, add=everyone.process_set is horovod().global_process_set)
            for part in (self._team, self._lane):
                if part is not None and part.size > 1:
                    part.process_set = known[tuple(sorted(part.ranks))]

        together(everyone, find)

    @property
    def worker(self) -> int:  # noqa: D102
        return self._worker

    @property
    def workers(self) -> int:  # noqa: D102
        return len(self._groups)

    @property
    def counts(self) -> Sequence[int]:  # noqa: D102
        return self._counts

    @property
    def groups(self) -> Sequence[Sequence[int]]:  # noqa: D102
        return self._groups

    @property
    def team(self) -> Communicator:  # noqa: D102
        return self._team

    def passed_on(self, sizes: Iterable[int]) -> int:  # noqa: D102
        return (self.team.size - 1) * sum(self._span(size, self._place)[1] for size in sizes)

    def part(self, ranks: Sequence[int]) -> Communicator:  # noqa: D102
        return self._everyone.part(ranks)

    def find_hosts(self) -> list[list[int]]:  # noqa: D102
        return self._everyone.find_hosts()

    def finish(self) -> None:  # noqa: D102
        self._everyone.finish()

    def check(self) -> None:  # noqa: D102
        self._everyone.check()

    def use(self) -> AbstractContextManager[None]:  # noqa: D102
        return self._everyone.use()

    def close(self) -> None:  # noqa: D102
        for communicator in (self._team, self._lane):
            if communicator is not None:
                communicator.close()
        super().close()

    # -- workers ----------------------------------------------------------------------------------

    def allgather(self, payload: Tensor, out: Sequence[Tensor], channel: Channel) -> None:  # noqa: D102
        if self._lane is not None:
            self._lane.allgather(self._cut(payload), self._cuts(out), channel)
        self._put_together(payload, out, channel)

    def alltoall(self, pieces: Sequence[Tensor], out: Sequence[Tensor]) -> None:  # noqa: D102
        if self._lane is not None:
            self._lane.alltoall(self._cuts(pieces), self._cuts(out))
        self._put_together(pieces[self.worker], out, Channel.UP)

    def allreduce_mean(self, tensor: Tensor, name: str) -> None:  # noqa: D102
        if self.workers == 1:
            return
        flat = tensor.detach().reshape(-1)
        if not self.alike:
            flat.mul_(self.weights[self.worker] * self.workers)
        mine = self._cut(flat)
        if self._lane is not None and mine.numel():
            self._lane.allreduce_mean(mine, name)
        if self.team.size > 1:
            slices = [self._cut(flat, place).view(torch.uint8) for place in range(self.team.size)]
            self.team.allgather(mine.clone().view(torch.uint8), slices, Channel.UP)
        if flat.data_ptr() != tensor.data_ptr():
            with torch.no_grad():
                tensor.copy_(flat.view(tensor.shape))

    def _put_together(self, own: Tensor, out: Sequence[Tensor], channel: Channel) -> None:
        """Completes each out[k], of which this rank has its slice, with the team's slices; copies `own`.

        Collective over the team.
        """
        out[self.worker].copy_(own)
        others = [piece for k, piece in enumerate(out) if k != self.worker]
        if self.team.size == 1 or not others:
            return
        places = range(self.team.size)
        sizes = [sum(self._span(piece.numel(), place)[1] for piece in others) for place in places]
        landed = torch.split(own.new_empty(sum(sizes)), sizes)
        self.team.allgather(torch.cat(self._cuts(others)), landed, channel)
        for place in places:
            if place != self._place:
                slices = self._cuts(others, place)
                copy_pieces(torch.split(landed[place], [one.numel() for one in slices]), slices)

    def _span(self, size: int, place: int) -> tuple[int, int]:
        """Returns start and length of the slice, in `size` elements, of the rank at `place` in its team."""
        start, stop = (min(p, self._lanes) * size // self._lanes for p in (place, place + 1))
        return start, stop - start

    def _cut(self, tensor: Tensor, place: int | None = None) -> Tensor:
        return tensor.narrow(0, *self._span(tensor.numel(), self._place if place is None else place))

    def _cuts(self, tensors: Sequence[Tensor], place: int | None = None) -> list[Tensor]:
        return [self._cut(tensor, place) for tensor in tensors]

    # -- ranks ------------------------------------------------------------------------------------

    def broadcast(self, tensor: Tensor, root: int) -> None:  # noqa: D102
        self._everyone.broadcast(tensor, root)

    def allgather_object(self, value: Any) -> list[Any]:  # noqa: D102
        return self._everyone.allgather_object(value)

    def combine(self, word: int) -> int:  # noqa: D102
        return self._everyone.combine(word)
