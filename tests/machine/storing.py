"""What users do between steps: rounds completed early, states in and out, checkpoints, growth."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from hvd_saef import load_checkpoint, save_checkpoint
from tests.machine.actions import Action
from tests.machine.loading import load_model, load_seat, misfits, saved_seat
from tests.machine.model import Reference
from tests.machine.net import of_layers
from tests.machine.options import Options
from tests.machine.reference import Part, everywhere, same
from tests.machine.worker import Worker


@dataclass(frozen=True, repr=False)
class Collective(Action):
    """flush(), consolidate() or reanchor(), of one optimizer."""

    what: str = "flush"
    part: int = 0

    def shows(self, number: int, parts: int) -> bool:
        return number == self.part % parts

    def do(self, worker: Worker) -> None:
        getattr(worker.optimizers[self.part % len(worker.optimizers)], self.what)()

    def say(self, reference: Reference) -> None:
        number = self.part % len(reference.parts)
        part = reference.parts[number]
        reference.may_refuse(number)
        if self.what == "reanchor":
            _reanchor(reference, number, part)
        else:
            reference.agree(number, {})
            reference.complete(number, at_least=1)
            if self.what == "consolidate":
                _consolidate(reference.options, part)
        for rank in range(reference.size):
            reference.stale(rank)


def _consolidate(options: Options, part: Part) -> None:
    if not options.averages_gradients:
        # What was written by hand stays: as part of the next update it brings x~ to the same place.
        moved = [seat for seat in part.seats if not same(seat.point, part.start(seat))]
        part.average_errors()
        for seat in part.seats:
            seat.consolidated = True
            if not any(seat is one for one in moved):
                seat.point = part.start(seat)
    for moments in ("m", "v"):
        of_seats = [getattr(seat.steps, moments) for seat in part.seats]
        for i in sorted({i for one in of_seats for i in one}):
            there = [one.get(i) for one in of_seats[:: options.ranks]]
            zero = np.zeros_like(next(m for m in there if m is not None))
            mean = sum(zero if m is None else m for m in there) / len(there)
            for one in of_seats:
                if i in one:
                    one[i] = mean.copy()


def _reanchor(reference: Reference, number: int, part: Part) -> None:
    for rank in range(reference.size):
        reference.take_in(number, rank)
    if len({(seat.names, tuple(seat.buckets)) for seat in part.seats}) > 1:
        raise everywhere(reference.size, "ConfigurationMismatchError")
    # Where rank 0 may be at either of two points, what it shows now says at which one it was.
    shows, names = reference.showed[0], part.seats[0].names
    root = min(
        reference.possible(0), key=lambda place: max(float(np.abs(shows[n] - place[n]).max()) for n in names)
    )
    t = part.seats[0].t
    for seat in part.seats:
        seat.x = {name: root[name].copy() for name in seat.names}
        seat.t, seat.source, seat.taken, seat.under = t, "kept", True, reference.options
        seat.clear()


@dataclass(frozen=True, repr=False)
class SaveCheckpoint(Action):
    """save_checkpoint, of the first optimizer."""

    def do(self, worker: Worker) -> None:
        save_checkpoint(worker.folder, worker.net, worker.optimizers[0], rank=worker.rank)
        worker.served = [worker.pieces(0)]

    def say(self, reference: Reference) -> None:
        part = reference.parts[0]
        for rank in range(reference.size):
            reference.take_in(0, rank)
        if len({seat.names for seat in part.seats}) > 1:
            raise everywhere(reference.size, "ConfigurationMismatchError")
        # A worker has one file, of its first rank.
        firsts = [rank - rank % reference.options.ranks for rank in range(reference.size)]
        seats = [saved_seat(reference, 0, first) for first in firsts]
        reference.stored = seats, [copy.deepcopy(reference.at_x(first)) for first in firsts]
        for rank, seat in enumerate(part.seats):
            reference.stale(rank)
            seat.mode = "either" if seat.mode == "visit" else seat.mode


@dataclass(frozen=True, repr=False)
class LoadCheckpoint(Action):
    """load_checkpoint, into the first optimizer."""

    def shows(self, number: int, parts: int) -> bool:
        return number == 0

    def do(self, worker: Worker) -> None:
        extra = load_checkpoint(worker.folder, worker.net, worker.optimizers[0])
        if extra != {"rank": worker.rank}:
            raise AssertionError(f"rank {worker.rank} got {extra}")

    def say(self, reference: Reference) -> None:
        part = reference.parts[0]
        for rank in range(reference.size):
            reference.take_in(0, rank)
            reference.stale(rank)
        if reference.stored is None:
            raise everywhere(reference.size, "CheckpointError")
        seats, models = reference.stored
        if any(seat.names != saved.names for seat, saved in zip(part.seats, seats, strict=True)):
            raise everywhere(reference.size, "CheckpointError")
        if misfits(reference, seats, range(reference.size)):
            raise everywhere(reference.size, "CheckpointError")
        for rank, (seat, saved) in enumerate(zip(part.seats, seats, strict=True)):
            load_seat(reference, part, rank, saved)
            load_model(reference, rank, models[rank])
            if seat.mode != "eval":
                seat.mode = "either" if reference.options.hooked else "train"


@dataclass(frozen=True, repr=False)
class Grow(Action):
    """The layer extra is added to the first optimizer."""

    def do(self, worker: Worker) -> None:
        if not worker.among(self.ranks):
            return
        parameters = [worker.named[name] for name in of_layers(["extra"])]
        rate = worker.optimizers[0].param_groups[0]["lr"]
        worker.optimizers[0].add_param_group({"params": parameters, "lr": rate})

    def say(self, reference: Reference) -> None:
        refused: dict[int, tuple[str, ...]] = {}
        names = of_layers(["extra"])
        for rank in reference.of(self.ranks):
            seat, held = reference.parts[0].seats[rank], reference.held[0][rank]
            if seat.h:
                refused[rank] = ("RuntimeError",)
            elif set(names) <= set(held):
                refused[rank] = ("ValueError",)
            else:
                reference.held[0][rank] = (*held, *names)
                reference.take_in(0, rank)
        if refused:
            reference.refuse(refused)
