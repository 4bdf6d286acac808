"""A loaded state, until all workers have agreed on it: which parts of it training continues with.

The point x̃ = x - (s + mean e) is kept under any settings, and no local step since the last round is lost.
If the errors or the settings differ from those under which the local steps were taken, the steps are added
to the error, which is sent in any case.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hvd_saef.memory.layout import Layout
from hvd_saef.memory.state import BucketState, State, place_stretches
from hvd_saef.round.modes import Modes
from hvd_saef.transport.communicator import Communicator


@dataclass(frozen=True)
class Held:
    """Describes what a loaded state holds, as far as the other workers need to know."""

    own: bool = True
    """True if e is this worker's own; False if another worker's state was loaded."""
    serves: bool = True
    """True if the state holds all of s that this worker serves, or was saved with single-way compression."""
    whole: bool = True
    """True if the state holds all of s, or was saved with single-way compression, which has no s."""
    pieces: bool = False
    """True if the state holds some of s."""
    reached: bool = False
    """True if the saved training point is not the start of a round (b)."""
    start: tuple[float, float] | None = None
    """α and β when the state was saved; None means those of now."""
    count: int | None = None
    """The worker's count in means when the state was saved; None if unknown or without effect."""


@dataclass
class Loaded:
    """Holds what this worker loaded. Without arguments, it holds nothing."""

    held: Held = Held()
    training_point: list[Tensor] | None = None
    """The training point, one tensor per parameter; None if the training point is b."""
    server_errors: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    """The names of the parameters that the saved state has."""
    saver: int | None = None
    """The worker that saved the state; None if nothing is loaded."""
    has_writes: bool = False
    """True if :meth:`with_writes` has counted what other code wrote."""

    @classmethod
    def of(cls, saved: Mapping[str, Any], with_state: Layout, own: bool, serves: bool) -> Loaded:
        """Returns what `saved`, a state dict that :func:`check_state` has accepted, holds. Local."""
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
        point = None if reached is None else [reached[slot.name] for slot in with_state.slots]
        return cls(held, point, pieces, settings, frozenset(saved["x"]), saved["rank"])

    @torch.no_grad()
    def with_writes(self, modes: Modes) -> Loaded:
        """Returns this, with what other code wrote to the parameters since as part of the local steps. Local.

        A parameter that holds x was not written by hand: the model's state was loaded after the optimizer's.
        """
        state, now = modes.state, modes.training_point() if modes.was_written() else None
        if state is None or now is None or self.saver is None or self.has_writes:
            return self
        here = dict(zip((slot.name for slot in state.layout.slots), now, strict=True))
        loaded = dict(zip(here, self.training_point or [], strict=False))
        points, written = {}, False
        for one in state.buckets:
            shown = one.start_point(state.settings.alpha, state.settings.beta, one.s)
            start = one.start_point(*self._start(state), self.server_error(one))
            for slot in one.bucket.slots:
                to, value = slot.parameter.dtype, here[slot.name]
                stood = loaded.get(slot.name, slot.view(shown).to(to)).to(value.device)
                points[slot.name] = loaded.get(slot.name, slot.view(start).to(to)).to(value.device)
                if not torch.equal(value, stood) and not torch.equal(value, slot.view(one.x).to(to)):
                    points[slot.name], written = points[slot.name] + (value - stood), True
        if not written:
            return self
        point = [points[name].clone() for name in here]
        return replace(self, held=replace(self.held, reached=True), training_point=point, has_writes=True)

    def _start(self, state: State) -> tuple[float, float]:
        """Returns the α and β under which the loaded local steps began."""
        return self.held.start or (state.settings.alpha, state.settings.beta)

    @torch.no_grad()
    def updates(self, state: State) -> list[Tensor]:
        """Returns the update of the loaded local steps, b - y, [numel] per bucket; empty if none was taken.

        Local.
        """
        if self.training_point is None:
            return []
        alpha, beta = self._start(state)
        reached = dict(zip((slot.name for slot in state.layout.slots), self.training_point, strict=True))
        updates = []
        for one in state.buckets:
            update = one.start_point(alpha, beta, self.server_error(one))
            for slot in one.bucket.slots:
                slot.view(update).sub_(reached[slot.name].to(update.device))
            updates.append(update)
        return updates

    def all_server_errors(self, state: State) -> dict[str, Any]:
        """Returns a consolidated state's s, by parameter; 0 where it was saved without a server. Local."""
        nothing = {
            slot.name: {"start": 0, "values": one.s.new_zeros(slot.parameter.numel())}
            for one in state.buckets
            if one.s is not None
            for slot in one.bucket.slots
        }
        return nothing | dict(self.server_errors)

    def server_error(self, one: BucketState) -> Tensor:
        """Returns the loaded part of the bucket's s, [numel], with zeros where nothing was loaded. Local."""
        whole = one.bucket.new_flat()
        place_stretches(one.bucket, self.server_errors, whole, 0)
        return whole

    def has_all_of(self, one: BucketState) -> bool:
        """Returns True if all of the bucket's s was loaded. Local."""
        return place_stretches(one.bucket, self.server_errors, one.bucket.new_flat(), 0) == one.bucket.numel

    @torch.no_grad()
    def go_on(
        self, communicator: Communicator, state: State, everyone: Sequence[Held]
    ) -> tuple[bool, list[str]]:
        """Continues from what all workers loaded, each from its own part; changes e and s. Collective.

        Returns True if a round begins, since the local steps were added to the errors; and, in words, what
        is lost.
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
        """Puts s together from the parts that all workers loaded. Collective.

        Returns True if all of s was found; if not, sets s to zero and returns False. This is needed when a
        worker serves another part than it saved, as after parameters joined during training. If there is no
        server any more, all of s is added to every worker's e.
        """
        whole, collected = True, []
        for one in state.buckets:
            begin = one.parts[one.mine].start if one.s is not None else 0
            s = torch.full_like(one.e if one.s is None else one.s, torch.nan)
            for slot in one.bucket.slots:  # one at a time: all slots together are as large as the model
                mine = self.server_errors.get(slot.name)
                nothing = {"start": 0, "values": s.new_zeros(slot.parameter.numel())}
                joined = slot.name not in self.names  # after the state was saved
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
    """Returns the worker's weight in means when saved, over the weight of now; and True if no weight changed.

    The first is the factor by which e must be multiplied so that its share in the mean stays the same.
    """
    now = [communicator.counts[k] for k in range(communicator.workers)]
    firsts: Iterable[int] = (group[0] for group in communicator.groups)
    then = [everyone[first].count or now[k] for k, first in enumerate(firsts)]
    mine = communicator.worker
    factor = (then[mine] / sum(then)) / (now[mine] / sum(now))
    return factor, all(a * sum(now) == b * sum(then) for a, b in zip(then, now, strict=True))
