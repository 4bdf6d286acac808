"""What users do between steps: rounds completed early, states in and out, checkpoints, growth."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch

from hvd_saef import load_checkpoint, save_checkpoint
from tests.machine.actions import Action
from tests.machine.model import Reference
from tests.machine.net import NAMES, SHAPES, Vec, of_layers
from tests.machine.options import Options
from tests.machine.reference import Part, Seat, everywhere
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


def same(one: Vec, other: Vec) -> bool:
    """Whether these are the same numbers."""
    return all(np.array_equal(one[name], other[name]) for name in one)


def _reanchor(reference: Reference, number: int, part: Part) -> None:
    for rank in range(reference.size):
        reference.take_in(number, rank)
    if len({seat.names for seat in part.seats}) > 1:
        raise everywhere(reference.size, "ConfigurationMismatchError")
    root = reference.shown(0)
    for seat in part.seats:
        seat.x = {name: root[name].copy() for name in seat.names}
        seat.t, seat.source, seat.taken = part.seats[0].t, "kept", True
        seat.clear()


@dataclass(frozen=True, repr=False)
class Save(Action):
    """Each rank keeps its optimizers' and its model's state dicts."""

    def do(self, worker: Worker) -> None:
        if worker.among(self.ranks):
            states = [copy.deepcopy(o.state_dict()) for o in worker.optimizers]
            if all("x" in state["hvd_saef"] for state in states):
                worker.saved["optimizers"] = states
            worker.saved["model"] = {k: v.clone() for k, v in worker.net.state_dict().items()}
            worker.seen.append(worker.values())

    def say(self, reference: Reference) -> None:
        for rank in reference.of(self.ranks):
            for number in range(len(reference.parts)):
                reference.take_in(number, rank)
            if all(seat.taken for seat in reference.seats(rank)):
                reference.saved[rank]["seats"] = copy.deepcopy(reference.seats(rank))
            reference.look(rank)
            reference.saved[rank]["model"] = copy.deepcopy(reference.shown(rank))


@dataclass(frozen=True, repr=False)
class Load(Action):
    """What was saved, into the optimizers; and into the model, or not."""

    model: bool = False

    def do(self, worker: Worker) -> None:
        if worker.among(self.ranks) and "optimizers" in worker.saved:
            for optimizer, state in zip(worker.optimizers, worker.saved["optimizers"], strict=True):
                optimizer.load_state_dict(copy.deepcopy(state))
            if self.model:
                worker.net.load_state_dict(worker.saved["model"])

    def say(self, reference: Reference) -> None:
        refused: dict[int, tuple[str, ...]] = {}
        for rank in reference.of(self.ranks):
            if "seats" not in reference.saved[rank]:
                continue
            for number, (seat, saved) in enumerate(
                zip(reference.seats(rank), reference.saved[rank]["seats"], strict=True)
            ):
                reference.take_in(number, rank)
                if seat.names != saved.names:
                    refused[rank] = ("ValueError",)
                    break
                load_seat(seat, saved)
            reference.stale(rank)
            if self.model and rank not in refused:
                load_model(reference, rank, reference.saved[rank]["model"])
        if refused:
            reference.refuse(refused)


def load_seat(seat: Seat, saved: Seat) -> None:
    """An optimizer's state on one rank, by this same rank."""
    mode = seat.mode
    vars(seat).update(copy.deepcopy(vars(saved)))
    seat.mode, seat.source, seat.own = mode, "loaded", True
    if not saved.taken:
        seat.source = "parameters"


def load_model(reference: Reference, rank: int, values: Vec) -> None:
    """A whole model's state on one rank: what x is from now on, unless it was that before."""
    for seat in reference.seats(rank):
        mine = {name: values[name].copy() for name in seat.names}
        seat.mode = "eval" if seat.mode == "eval" else "either"  # hooks may bring it to x to load it
        if not same(mine, seat.x):
            seat.x, seat.source = mine, "parameters"
            seat.clear()
    for name in NAMES:
        if not any(name in seat.names for seat in reference.seats(rank)):
            reference.raw[rank][name] = values[name].copy()
    reference.stale(rank)


@dataclass(frozen=True, repr=False)
class LoadModel(Action):
    """A state into the model: the one that was saved, or (kind) its own present "x", or "other" numbers."""

    kind: str = "saved"

    def do(self, worker: Worker) -> None:
        if not worker.among(self.ranks):
            return
        if self.kind == "saved":
            if worker.saved:
                worker.net.load_state_dict(worker.saved["model"])
        elif self.kind == "x":
            worker.net.load_state_dict({k: v.clone() for k, v in worker.net.state_dict().items()})
        else:
            worker.net.load_state_dict({k: torch.from_numpy(v) for k, v in other_values().items()})

    def say(self, reference: Reference) -> None:
        for rank in reference.of(self.ranks):
            if self.kind == "saved":
                if reference.saved[rank]:
                    load_model(reference, rank, reference.saved[rank]["model"])
            elif self.kind == "x":
                reference.move(rank, "visit")
                load_model(reference, rank, reference.at_x(rank))
            else:
                load_model(reference, rank, other_values())


def other_values() -> Vec:
    """A model that was trained elsewhere."""
    generator = np.random.default_rng(77)
    return {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}


@dataclass(frozen=True, repr=False)
class SaveCheckpoint(Action):
    """save_checkpoint, of the first optimizer."""

    def do(self, worker: Worker) -> None:
        save_checkpoint(worker.folder, worker.net, worker.optimizers[0], rank=worker.rank)

    def say(self, reference: Reference) -> None:
        part = reference.parts[0]
        for rank in range(reference.size):
            if rank % reference.options.ranks == 0:
                reference.take_in(0, rank)
        seats = copy.deepcopy(part.seats)
        reference.stored = seats, [copy.deepcopy(reference.at_x(rank)) for rank in range(reference.size)]
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
        for rank, (seat, saved) in enumerate(zip(part.seats, seats, strict=True)):
            load_seat(seat, saved)
            load_model(reference, rank, models[rank])
            if seat.mode != "eval":
                seat.mode = "either" if reference.options.hooked else "train"


@dataclass(frozen=True, repr=False)
class Grow(Action):
    """The layer extra is added to the first optimizer."""

    def do(self, worker: Worker) -> None:
        parameters = [worker.named[name] for name in of_layers(["extra"])]
        rate = worker.optimizers[0].param_groups[0]["lr"]
        worker.optimizers[0].add_param_group({"params": parameters, "lr": rate})

    def say(self, reference: Reference) -> None:
        refused: dict[int, tuple[str, ...]] = {}
        names = of_layers(["extra"])
        for rank, seat in enumerate(reference.parts[0].seats):
            if seat.h:
                refused[rank] = ("RuntimeError",)
            elif set(names) <= set(reference.held[0]):
                refused[rank] = ("ValueError",)
        if refused:
            reference.refuse(refused)
        reference.held[0] = (*reference.held[0], *names)
        for rank in range(reference.size):
            reference.take_in(0, rank)
