"""What every rank's parameters and gradients should be, whatever is called: around the parts' algorithm."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.machine.net import NAMES, Vec, of_layers, slopes, start_values
from tests.machine.options import Options
from tests.machine.reference import Over, Part, Refused, Seat, everywhere, make_seat, one_of_all
from tests.oracle import Array

Gradients = dict[str, "Array | None"]


@dataclass
class Loss:
    """A forward pass that waits for its backward pass."""

    gradient: Vec
    stale: bool = False
    """The parameters were written to since: autograd may refuse, or get it right."""


class Reference:
    """All ranks of a program. `happened`, the names of what they raised, decides where several are right."""

    def __init__(self, options: Options) -> None:
        self.size = options.size
        self.saved: list[dict[str, Any]] = [{} for _ in range(self.size)]
        self.stored: Any = None
        """What the checkpoint holds."""
        self.seen: list[list[Vec]] = [[] for _ in range(self.size)]
        """What each rank should have seen in its looks, of the present action."""
        self.happened: Sequence[str] = [""] * self.size
        self.showed: Sequence[Vec] = []
        """The parameters after the present action, which decide where a rank may have done either of two."""
        self.served: Sequence[Any] = []
        """The pieces of s that each rank's states held, where the present action saved them."""
        self.wrap(options)

    def wrap(self, options: Options) -> None:
        """A new network and new optimizers, as a job has that starts again."""
        self.options = options
        start = start_values(options.seed)
        ranks = range(self.size)
        self.raw = [copy.deepcopy(start) for _ in ranks]
        """Of each rank, what no optimizer has."""
        self.parts = [
            Part(options, [make_seat(options, self._starting(part)) for _ in ranks])
            for part in range(len(options.overlap))
        ]
        frozen = of_layers(["extra"]) if options.extra == "frozen" else ()
        self.requires = [{name: name not in frozen for name in NAMES} for _ in ranks]
        self.held = [[options.names(part) for _ in ranks] for part in range(len(options.overlap))]
        """What each optimizer has on each rank, frozen ones too."""
        self.gradients: list[Gradients] = [dict.fromkeys(NAMES) for _ in ranks]
        self.losses: list[list[Loss]] = [[] for _ in ranks]
        self.under_way: list[set[int]] = [set() for _ in ranks]
        """Of each rank, the optimizers with overlap=True that may have sent something of this step."""
        self.changed: list[set[int]] = [set() for _ in ranks]
        """And those of them whose options were changed since."""
        self.hooks: list[list[str]] = [[] for _ in ranks]
        """When each rank's step hooks look: "pre" or "post"."""
        for part in self.parts:
            for seat in part.seats:
                seat.lay_out(seat.names, options.small_buckets)

    def _starting(self, part: int) -> Vec:
        frozen = of_layers(["extra"]) if self.options.extra == "frozen" else ()
        start = start_values(self.options.seed)
        return {name: start[name] for name in self.options.names(part) if name not in frozen}

    def of(self, ranks: Collection[int] | None) -> list[int]:
        """The ranks that an action is for."""
        return [rank for rank in range(self.size) if ranks is None or rank in ranks]

    def seats(self, rank: int) -> list[Seat]:
        """This rank's, of all optimizers."""
        return [part.seats[rank] for part in self.parts]

    def moving(self, rank: int) -> set[str]:
        """The parameters that a background may be stepping now."""
        return {name for part in self.under_way[rank] for name in self.parts[part].seats[rank].names}

    def may_refuse(self, number: int) -> None:
        """Something collective may be refused on all ranks, if one has sent something already."""
        started = any(number in parts for parts in self.under_way)
        if started and all(name in ("RuntimeError", "WorkerError") for name in self.happened):
            raise everywhere(self.size, "RuntimeError", "WorkerError")

    def may_end(self, number: int) -> None:
        """Step() may be refused on all ranks, if what it needs was changed while something was under way."""
        changed = any(number in parts for parts in self.changed)
        if changed and all(name in ("RuntimeError", "WorkerError") for name in self.happened):
            raise Over([("RuntimeError", "WorkerError")] * self.size)
        for parts in self.changed:
            parts.discard(number)

    def may_lack(self, number: int) -> None:
        """With overlap=True, ranks may have sent something of this step and others, loaded anew, nothing."""
        seats = self.parts[number].seats
        some = (
            len({seat.source == "kept" for seat in seats}) > 1
            or len({str(seat.buckets) for seat in seats}) > 1
        )
        names = ("RuntimeError", "WorkerError", "ConfigurationMismatchError")
        if self.options.overlap[number] and some and all(name in names for name in self.happened):
            raise Over([names] * self.size)

    # -- where parameters are -------------------------------------------------------------------------

    def possible(self, rank: int) -> list[Vec]:
        """What the parameters may be now: one thing, but where a hook may have left them at x."""
        places: list[Vec] = [dict(self.raw[rank])]
        for seat in self.seats(rank):
            here = {"train": [seat.point], "eval": [seat.x], "visit": [seat.x]}
            choices = here.get(seat.mode, [seat.x, seat.point])
            places = [place | choice for place in places for choice in choices]
        return places

    def open(self, rank: int) -> set[str]:
        """The parameters that are at x or at the training point: a hook may have left them at either."""
        places = self.possible(rank)
        return {name for name in places[0] if any(p[name] is not places[0][name] for p in places[1:])}

    def shown(self, rank: int) -> Vec:
        """What the parameters are."""
        return self.possible(rank)[0]

    def at_x(self, rank: int) -> Vec:
        """The parameters at x."""
        values = dict(self.raw[rank])
        for seat in self.seats(rank):
            values |= seat.x
        return values

    def move(self, rank: int, mode: str) -> None:
        """All optimizers of a rank: to "train", "eval"; or, for hooks, to "visit" x or "leave" it."""
        for seat in self.seats(rank):
            move(seat, mode)
        self.stale(rank)

    def stale(self, rank: int) -> None:
        """The parameters were written to."""
        for loss in self.losses[rank]:
            loss.stale = True

    def look(self, rank: int) -> None:
        """Somebody looks at x by the model's hooks; without hooks, at what there is."""
        if self.options.hooked:
            self.move(rank, "visit")
        self.seen[rank].append(copy.deepcopy(self.shown(rank)))

    # -- gradients --------------------------------------------------------------------------------------

    def forward(self, rank: int, training: bool, number: int, used: Collection[str], grad: bool) -> None:
        """A forward pass in either mode."""
        if self.options.hooked:
            self.move(rank, "leave" if training else "visit")
        if not training:
            self.seen[rank].append(copy.deepcopy(self.shown(rank)))
        if grad:
            gradient = slopes(self.shown(rank), rank, number, used)
            wanted = {name: g for name, g in gradient.items() if self.requires[rank][name]}
            if wanted:
                self.losses[rank].append(Loss(wanted))

    def backward(self, rank: int) -> bool:
        """The backward pass of what waits. Whether autograd refused, as it may where parameters moved."""
        for loss in self.losses[rank]:
            if loss.stale and self.happened[rank] == "RuntimeError":
                self.zero(rank)
                self.losses[rank] = []
                return True
            for name, slope in loss.gradient.items():
                before = self.gradients[rank][name]
                self.gradients[rank][name] = slope if before is None else before + slope
        if self.losses[rank]:
            self.under_way[rank] = {part for part, overlaps in enumerate(self.options.overlap) if overlaps}
        self.losses[rank] = []
        return False

    def zero(self, rank: int, to_none: bool = True) -> None:
        """zero_grad of the model."""
        self.gradients[rank] = {
            name: None if to_none or gradient is None else np.zeros_like(gradient)
            for name, gradient in self.gradients[rank].items()
        }

    def average_gradients(self, names: Collection[str]) -> None:
        """Over a worker's ranks; or over all workers, where gradients are averaged."""
        per = self.options.ranks
        for first in range(0, self.size, per):
            self._average(names, range(first, first + per), zero_if_none=False)
        if self.options.averages_gradients:
            self._average(names, range(self.size), zero_if_none=True, half=self.options.compressor == "fp16")

    def _average(
        self, names: Collection[str], ranks: Sequence[int], zero_if_none: bool, half: bool = False
    ) -> None:
        for name in names:
            there = [self.gradients[rank][name] for rank in ranks]
            some = next((g for g in there if g is not None), None)
            if some is None and not zero_if_none:
                continue
            shape = self.shown(0)[name].shape
            whole = [np.zeros(shape) if g is None else g for g in there]
            if half:
                whole = [g.astype(np.float16) for g in whole[:: self.options.ranks]]
            total = whole[0].copy()
            for other in whole[1:]:
                total += other
            total /= len(whole)
            for rank in ranks:
                self.gradients[rank][name] = total.astype(np.float64)

    # -- what is refused ------------------------------------------------------------------------------

    def refuse(self, ranks: dict[int, tuple[str, ...]]) -> None:
        """These ranks raise, in something local."""
        raise Refused([ranks.get(rank, ()) for rank in range(self.size)])

    # -- steps ------------------------------------------------------------------------------------------

    def take_in(self, number: int, rank: int) -> None:
        """Parameters of one optimizer that were frozen take part from now on, at their present values."""
        seat = self.parts[number].seats[rank]
        joining = [
            name
            for name in self.held[number][rank]
            if name not in seat.x and (self.requires[rank][name] or self.gradients[rank][name] is not None)
        ]
        for name in joining:
            seat.join(name, self.raw[rank][name])
        if joining:
            seat.lay_out(joining, self.options.small_buckets)

    def agree(self, number: int, failed: dict[int, str], takes_in: bool = True) -> None:
        """What comes before anything collective. Raises Refused for all, if some rank failed."""
        if takes_in:
            for rank in range(self.size):
                if rank not in failed:
                    self.take_in(number, rank)
        if failed:
            refused = one_of_all(failed, self.size)
            half_taken = any(number in parts for parts in self.under_way)
            raise Over(refused.ranks) if half_taken else refused
        self.may_lack(number)
        self.parts[number].settle()

    def step(self, number: int, failed: dict[int, str], synchronized: bool = False) -> None:
        """An optimizer takes a step, once closures have run; some ranks may have `failed`."""
        part = self.parts[number]
        self.agree(number, failed)
        for parts in self.under_way:
            parts.discard(number)
        names = part.seats[0].names
        everything = [self.gradients[rank][name] for rank in range(self.size) for name in names]
        if any(g is not None and not np.isfinite(g).all() for g in everything):
            if self.options.on_nonfinite == "raise":
                raise everywhere(self.size, "NonFiniteUpdateError")
            for seat in part.seats:
                seat.skipped += 1
            return
        if not synchronized:
            self.average_gradients(names)
        self._hooks_look("pre")
        part.local_step(self.gradients)
        self._hooks_look("post")
        for seat in part.seats:
            seat.mode = "train" if seat.mode == "visit" else seat.mode  # step() ends where training is
        self.complete(number, at_least=self.options.local_steps)
        for rank in range(self.size):
            self.stale(rank)

    def _hooks_look(self, when: str) -> None:
        for rank in range(self.size):
            for _ in range(self.hooks[rank].count(when)):
                self.look(rank)

    def complete(self, number: int, at_least: int) -> None:
        """The exchange, if so many local steps were taken."""
        part = self.parts[number]
        if part.seats[0].h >= at_least:
            part.complete_round()
            for seat in part.seats:
                seat.mode = seat.mode if seat.mode == "eval" else "train"


def move(seat: Seat, mode: str) -> None:
    """One optimizer's parameters on one rank."""
    if mode == "visit":
        seat.mode = seat.mode if seat.mode == "eval" else "visit"
    elif mode == "leave":
        seat.mode = seat.mode if seat.mode == "eval" else "train"
    else:
        seat.mode = mode
