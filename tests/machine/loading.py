"""States in and out: of optimizers and models, by all ranks or some, their own or others', in other jobs."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tests.machine.actions import Action, whole_workers
from tests.machine.model import Reference
from tests.machine.net import NAMES, SHAPES, Vec, of_layers
from tests.machine.options import Options
from tests.machine.reference import Part, Seat, same
from tests.machine.worker import Worker

ROUNDING = 1e-12


@dataclass(frozen=True, repr=False)
class Rewrap(Action):
    """The job starts again: a new network and new optimizers, with these options."""

    options: Options = field(default_factory=Options)

    def do(self, worker: Worker) -> None:
        worker.wrap(self.options)

    def say(self, reference: Reference) -> None:
        reference.wrap(self.options)


@dataclass(frozen=True, repr=False)
class Save(Action):
    """Each rank keeps its optimizers' and its model's state dicts, where all can load them."""

    def do(self, worker: Worker) -> None:
        saved = dict(worker.saved())
        try:
            states = [copy.deepcopy(o.state_dict()) for o in worker.optimizers]
            if all("x" in state["hvd_saef"] for state in states):
                saved["optimizers"] = states
            worker.served = [worker.pieces(number) for number in range(len(states))]
            saved["model"] = {k: v.clone() for k, v in worker.net.state_dict().items()}
            worker.seen.append(worker.values())
        finally:
            worker.board.saves[worker.rank].append(saved)
            worker.board.all_saved.wait()

    def say(self, reference: Reference) -> None:
        for rank in range(reference.size):
            for number in range(len(reference.parts)):
                reference.take_in(number, rank)
            if all(seat.taken for seat in reference.seats(rank)):
                parts = range(len(reference.parts))
                reference.saved[rank]["seats"] = [saved_seat(reference, part, rank) for part in parts]
                reference.saved[rank]["held"] = [reference.held[part][rank] for part in parts]
            reference.look(rank)
            reference.saved[rank]["model"] = copy.deepcopy(reference.shown(rank))


def saved_seat(reference: Reference, number: int, rank: int) -> Seat:
    """What a rank's state dict holds: of s, only what this rank has of it."""
    part = reference.parts[number]
    saved = copy.deepcopy(part.seats[rank])
    served = reference.served[rank]
    saved.held = dict(served[number]) if served and saved.under.double else {}
    for name, s in saved.s.items():
        first, end = saved.held.get(name, (0, 0))
        kept = np.zeros(s.size)
        kept[first:end] = s.reshape(-1)[first:end]
        saved.s[name] = kept.reshape(s.shape)
    shown, moved = part.start(part.seats[rank]), saved.point
    moves = not same(moved, shown)
    if moves and saved.source == "loaded" and not saved.reached:  # by hand: it goes on from where b was then
        start = part.start(part.seats[rank], saved.under)
        saved.point = {name: start[name] + (moved[name] - shown[name]) for name in moved}
    saved.reached = saved.reached or saved.h > 0 or moves
    saved.saver = rank // reference.options.ranks if saved.saver is None else saved.saver
    return saved


@dataclass(frozen=True, repr=False)
class Load(Action):
    """What was saved, into the optimizers; and into the model, or not."""

    model: bool = False
    whose: str = "own"
    """The rank's "own" state, that of the "next" worker's rank, that of the "first" rank of all, or "plain":
    its own as torch's own optimizer would have saved it.
    """

    def source(self, rank: int, options: Options) -> int:
        """Whose state this is."""
        return {"next": (rank + options.ranks) % options.size, "first": 0}.get(self.whose, rank)

    def do(self, worker: Worker) -> None:
        saved = worker.saved(self.source(worker.rank, worker.options))
        if not worker.among(whole_workers(worker.options, self.ranks)) or "optimizers" not in saved:
            return
        for optimizer, state in zip(worker.optimizers, saved["optimizers"], strict=True):
            kept = {key: v for key, v in state.items() if key != "hvd_saef" or self.whose != "plain"}
            optimizer.load_state_dict(copy.deepcopy(kept))
        if self.model:
            worker.net.load_state_dict(saved["model"])

    def say(self, reference: Reference) -> None:
        refused: dict[int, tuple[str, ...]] = {}
        for rank in reference.of(whole_workers(reference.options, self.ranks)):
            saved = reference.saved[self.source(rank, reference.options)]
            if "seats" not in saved:
                continue
            for number, one in enumerate(saved["seats"]):
                reference.take_in(number, rank)
                part = reference.parts[number]
                grown = reference.held[number][rank] != saved["held"][number]
                plain = self.whose == "plain"
                unfit = part.seats[rank].names != one.names or misfits(reference, [one], [rank])
                if grown or (unfit and not plain):
                    refused[rank] = ("ValueError",)
                    break
                if plain:
                    load_plain(reference, rank, part.seats[rank], one)
                else:
                    load_seat(reference, part, rank, one)
            reference.stale(rank)
            if self.model and rank not in refused:
                load_model(reference, rank, saved["model"])
        if refused:
            reference.refuse(refused)


def misfits(reference: Reference, saved: Sequence[Seat], ranks: Iterable[int]) -> bool:
    """Whether some of these hold what the options of now have no place for, or lack what they need."""
    return any(_misfits(reference, one, rank) for one, rank in zip(saved, ranks, strict=True))


def _misfits(reference: Reference, saved: Seat, rank: int) -> bool:
    now = reference.options
    if not saved.taken:
        return False
    if now.averages_gradients or saved.under.averages_gradients:
        return now.averages_gradients != saved.under.averages_gradients
    if now.feedback != "none" or saved.under.feedback == "none":
        return False
    largest = max(float(np.abs(v).max()) for error in (saved.e, saved.s) for v in error.values())
    if 0 < largest < ROUNDING:  # it may be 0 in the library
        return reference.happened[rank] != ""
    return largest > 0


def load_seat(reference: Reference, part: Part, rank: int, saved: Seat) -> None:
    """An optimizer's state on one rank."""
    seat = part.seats[rank]
    own = saved.saver == rank // reference.options.ranks or saved.consolidated
    stays: dict[str, Any] = {"mode": seat.mode, "buckets": seat.buckets}
    if reference.options.averages_gradients:  # the parameters are the model's
        stays |= {"x": seat.x, "point": seat.point}
    vars(seat).update(copy.deepcopy(vars(saved)) | stays | {"source": "loaded", "own": own, "written": set()})
    if not saved.taken:
        seat.source = "parameters"
    elif not saved.reached and not reference.options.averages_gradients:
        seat.point = part.start(seat)


def load_plain(reference: Reference, rank: int, seat: Seat, saved: Seat) -> None:
    """The state of an optimizer of torch: x is where the parameters are, but for what only training moved."""
    seat.steps, seat.lr = copy.deepcopy(saved.steps), saved.lr
    if not seat.taken:
        seat.t = 0
        return
    for name in seat.written if seat.mode != "eval" else ():  # who writes at x, or looks later, may lose it
        shown = reference.showed[rank][name]
        if np.abs(shown - seat.point[name]).max() < np.abs(shown - seat.x[name]).max():
            seat.x[name] = seat.point[name]
    if reference.options.averages_gradients:
        seat.x = copy.deepcopy(seat.point)
    seat.t, seat.source, seat.taken = 0, "parameters", False
    seat.clear()


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
    layers: tuple[str, ...] = ()
    """Of these layers alone, by strict=False; () for all."""
    by_part: bool = False
    """Whether each of these layers is loaded by itself."""

    def do(self, worker: Worker) -> None:
        if not worker.among(_all_or(worker.options, self.ranks)):
            return
        if self.kind == "saved":
            state = worker.saved().get("model")
        elif self.kind == "x":
            state = {k: v.clone() for k, v in worker.net.state_dict().items()}
        else:
            state = {k: torch.from_numpy(v) for k, v in other_values().items()}
        if state is None:
            return
        if not self.layers:
            worker.net.load_state_dict(state)
        elif not self.by_part:
            worker.net.load_state_dict({k: state[k] for k in of_layers(self.layers)}, strict=False)
        else:
            for layer in self.layers:
                part = {k.partition(".")[2]: state[k] for k in of_layers([layer])}
                getattr(worker.net, layer).load_state_dict(part)

    def say(self, reference: Reference) -> None:
        for rank in reference.of(_all_or(reference.options, self.ranks)):
            values: Vec | None = other_values()
            if self.kind == "saved":
                values = reference.saved[rank].get("model")
            elif self.kind == "x":
                reference.move(rank, "visit")
                values = reference.at_x(rank)
            if values is not None:
                loaded: Collection[str] = of_layers(self.layers) if self.layers else NAMES
                load_model(reference, rank, reference.at_x(rank) | {name: values[name] for name in loaded})


def _all_or(options: Options, ranks: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Where gradients are averaged, nothing but the parameters is there to tell ranks apart: all load."""
    return None if options.averages_gradients else ranks


def other_values() -> Vec:
    """A model that was trained elsewhere."""
    generator = np.random.default_rng(77)
    return {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}
