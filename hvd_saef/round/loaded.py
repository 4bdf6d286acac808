"""A state that was loaded, until all workers have agreed on it: what of it goes on, under whatever settings.

x̃ = x - (s + mean e) is kept, and so are local steps since the last round: where the errors or the settings
are not those that they were taken with, they go on as a part of the error, which is sent all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvd_saef.memory.layout import Layout
from hvd_saef.memory.state import BucketState, State, place_stretches
from hvd_saef.transport.communicator import Communicator


@dataclass(frozen=True)
class Held:
    """What a loaded state holds, as the other workers need to know it."""

    own: bool = True
    """Whether its e is its own: not another worker's state was loaded."""
    serves: bool = True
    """Whether it has all of the server's error that it needs."""
    whole: bool = True
    """Whether it has all of the server's error, or there was no server."""
    pieces: bool = False
    """Whether it has some of the server's error."""
    reached: bool = False
    """Whether it is elsewhere than at a round's start."""
    start: tuple[float, float] | None = None
    """α and β when it was saved; None: as now."""
    count: int | None = None
    """How much its worker counted when it was saved; None: as now, or it does not matter."""


@dataclass
class Loaded:
    """What this worker loaded. Without arguments: nothing."""

    held: Held = Held()
    points: list[Tensor] | None = None
    """The training point, a tensor a parameter, unless it is b."""
    server_errors: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    """The parameters that were there when it was saved."""

    @classmethod
    def of(cls, saved: Mapping[str, Any], with_state: Layout, own: bool, serves: bool) -> Loaded:
        """What a state dict holds, which fits."""
        settings, pieces, reached = saved.get("settings", {}), saved["server_errors"], saved["reached"]
        found = sum(piece["values"].numel() for piece in pieces.values())
        one_way = not settings.get("double_compression", True)
        held = Held(
            own=own,
            serves=serves or one_way,
            whole=one_way or found == sum(bucket.numel for bucket in with_state.buckets),
            pieces=bool(pieces),
            reached=reached is not None,
            start=(settings["alpha"], settings["beta"]) if settings else None,
            count=None if saved["consolidated"] else saved.get("count"),
        )
        points = None if reached is None else [reached[slot.name] for slot in with_state.slots]
        return cls(held, points, pieces, settings, frozenset(saved["x"]))

    @torch.no_grad()
    def updates(self, state: State) -> list[Tensor]:
        """What the local steps did: b - y of each bucket, flat. Nothing, if none was taken."""
        if self.points is None:
            return []
        alpha, beta = self.held.start or (state.settings.alpha, state.settings.beta)
        points = dict(zip((slot.name for slot in state.layout.slots), self.points, strict=True))
        updates = []
        for one in state.buckets:
            update = one.start_point(alpha, beta, self.server_error(one))
            for slot in one.bucket.slots:
                slot.view(update).sub_(points[slot.name].to(update.device))
            updates.append(update)
        return updates

    def server_error(self, one: BucketState) -> Tensor:
        """The bucket's s as far as it is here, flat, [numel]: zero elsewhere."""
        whole = one.bucket.new_flat()
        place_stretches(one.bucket, self.server_errors, whole, 0)
        return whole

    def has_all_of(self, one: BucketState) -> bool:
        """Whether all of the bucket's s is here."""
        return place_stretches(one.bucket, self.server_errors, one.bucket.new_flat(), 0) == one.bucket.numel

    @torch.no_grad()
    def go_on(
        self, communicator: Communicator, state: State, everyone: Sequence[Held]
    ) -> tuple[bool, list[str]]:
        """Take what all workers loaded, each what it holds itself. Collective.

        Returns whether local steps were taken up into the errors, so that a round begins; and what is lost.
        """
        lost = []
        factor, alike = _factor(communicator, everyone)
        own = all(held.own for held in everyone)
        folds = not state.settings.double_compression and any(held.pieces for held in everyone)
        start = state.settings.alpha, state.settings.beta
        begins = not (own and alike and not folds and all(held.start in (None, start) for held in everyone))
        updates = self.updates(state) if begins else []
        if not own:
            state.clear_errors()
            lost.append("the workers' errors")
            if any(held.reached for held in everyone):
                lost.append("the other workers' local steps since the last round")
        elif not alike:
            state.scale_errors(factor)
            for update in updates:
                update.mul_(factor)
        if (folds or not all(held.serves for held in everyone)) and not self._collect(communicator, state):
            lost.append("the server's error")
        for one, update in zip(state.buckets, updates, strict=False):
            one.e.add_(update)
        return begins, lost

    def _collect(self, communicator: Communicator, state: State) -> bool:
        """Put s together from what all workers loaded; False, and zero, unless it was all there. Collective.

        A worker serves another share than when it saved, if parameters joined while training then. Where
        there is no server any more, s is added to every worker's error.
        """
        whole, collected = True, []
        for one in state.buckets:
            begin = one.parts[one.mine].start if one.s is not None else 0
            s = torch.full_like(one.e if one.s is None else one.s, torch.nan)
            for slot in one.bucket.slots:  # one at a time: together they are as large as the model
                mine = self.server_errors.get(slot.name)
                nothing = {"start": 0, "values": s.new_zeros(slot.parameter.numel())}
                joined = slot.name not in self.names  # since then
                for piece in [nothing] if joined else communicator.allgather_object(mine):
                    place_stretches(one.bucket, {} if piece is None else {slot.name: piece}, s, begin)
            whole = whole and not bool(s.isnan().any())
            collected.append(s)
        whole = all(communicator.allgather_object(whole))
        for one, s in zip(state.buckets, collected, strict=True):
            if one.s is not None:
                one.s.copy_(s) if whole else one.s.zero_()
            elif whole:
                one.e.add_(s)
        return whole


def _factor(communicator: Communicator, everyone: Sequence[Held]) -> tuple[float, bool]:
    """By what this worker's error counts more or less than when it was saved; whether all count the same."""
    now = [communicator.counts[k] for k in range(communicator.workers)]
    firsts: Iterable[int] = (group[0] for group in communicator.groups)
    then = [everyone[first].count or now[k] for k, first in enumerate(firsts)]
    mine = communicator.worker
    factor = (then[mine] / sum(then)) / (now[mine] / sum(now))
    return factor, all(a * sum(now) == b * sum(then) for a, b in zip(then, now, strict=True))
