"""Algorithm 1 for one optimizer, in plain numpy: what every rank's part of a model should be.

Rows are those of the table in hvd_saef.memory.algorithm. The model shares no code with the library. Each rank
has a seat, with a copy of everything: what a rank loads the others get to know of in their next step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.machine.net import NAMES, SHAPES, Vec
from tests.machine.options import RATIO, WEIGHT_DECAY, Options
from tests.oracle import Array, LocalOptimizer, Setup, mean, sign, topk


class Refused(Exception):  # noqa: N818
    """What each rank should raise, by the names of classes: none of them where the tuple is empty."""

    def __init__(self, ranks: Sequence[tuple[str, ...]]) -> None:
        super().__init__(ranks)
        self.ranks = list(ranks)


class Over(Refused):
    """As Refused, and what comes after it is not defined: the program ends."""


def everywhere(size: int, *names: str) -> Refused:
    """All ranks raise one of these."""
    return Refused([names] * size)


def one_of_all(failed: dict[int, str], size: int) -> Refused:
    """Some ranks raise their own error, so the others raise WorkerError."""
    return Refused([(failed.get(rank, "WorkerError"),) for rank in range(size)])


def zeros(names: Iterable[str]) -> Vec:
    """Nothing."""
    return {name: np.zeros(SHAPES[name]) for name in names}


def combined(f: Callable[..., Array], *vectors: Vec) -> Vec:
    """f, parameter by parameter."""
    return {name: np.asarray(f(*(vector[name] for vector in vectors))) for name in vectors[0]}


@dataclass
class Seat:
    """One rank's state of one optimizer."""

    x: Vec
    e: Vec
    s: Vec
    point: Vec
    """Where it trains: b, or what local steps have reached."""
    steps: LocalOptimizer
    lr: float = 0.05
    t: int = 0
    h: int = 0
    """Local steps since the round began."""
    mode: str = "train"
    """The parameters are at "train"'s point, at x after "eval" or on a "visit", or "either" may be."""
    source: str = "parameters"
    """Where x comes from at the next agreement: "parameters", "loaded" or "kept"."""
    taken: bool = False
    """Whether x was taken: before, it is what the parameters are."""
    own: bool = True
    consolidated: bool = False
    reached: bool = False
    """Whether what was loaded was between local steps."""
    skipped: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that take part."""
        return tuple(self.x)

    def clear(self) -> None:
        """X is the point from now on, without errors."""
        self.e, self.s = zeros(self.names), zeros(self.names)
        self.h, self.consolidated = 0, False
        self.point = copy.deepcopy(self.x)

    def moved_by_hand(self, values: Vec) -> None:
        """Somebody wrote to the parameters at the training point."""
        self.point |= values
        if not self.taken:
            self.x |= copy.deepcopy(values)


def make_seat(options: Options, values: Vec) -> Seat:
    """A rank that was just wrapped."""
    setup = Setup(
        workers=1,
        compressor="none",
        optimizer=options.optimizer,
        weight_decay=0.02 if WEIGHT_DECAY else 0,
        lr=lambda step: 0.0,
    )
    copied = [copy.deepcopy(values) for _ in range(2)]
    return Seat(copied[0], zeros(values), zeros(values), copied[1], LocalOptimizer(setup))


@dataclass
class Part:
    """All ranks' seats of one optimizer."""

    options: Options
    seats: list[Seat]
    checks: list[float] = field(default_factory=list)
    """How far x~ was, after each round, from where it should be: a check of this model."""

    @property
    def servers(self) -> list[Seat]:
        """One seat of each worker."""
        return self.seats[:: self.options.ranks]

    def mean(self, vectors: Sequence[Vec]) -> Vec:
        """Over the workers; vectors are by rank."""
        return combined(lambda *arrays: mean(list(arrays)), *vectors[:: self.options.ranks])

    # -- the rows -----------------------------------------------------------------------------------

    def start(self, seat: Seat) -> Vec:
        """Row 2's b."""
        alpha = self.options.alpha if self.options.feedback == "saef" else 0.0
        beta = self.options.beta
        return combined(lambda x, e, s: x - alpha * e - beta * s, seat.x, seat.e, seat.s)

    def compress(self, vector: Vec, t: int) -> Vec:
        """C: the identity while it is warm-up."""
        if t < self.options.warmup or self.options.compressor == "none":
            return copy.deepcopy(vector)
        if self.options.compressor == "fp16":
            return combined(lambda v: v.astype(np.float16), vector)
        return {name: self._by_blocks(value) for name, value in vector.items()}

    def _by_blocks(self, value: Array) -> Array:
        flat = value.reshape(-1)
        n = self.options.block_size or flat.size
        cut = [flat[i : i + n] for i in range(0, flat.size, n)]
        done = [sign(b) if self.options.compressor == "sign" else topk(b, RATIO) for b in cut]
        return np.concatenate(done).reshape(value.shape)

    def complete_round(self) -> None:
        """Rows 4 to 6, and 1 and 2 of the next round."""
        if self.options.averages_gradients:
            for seat in self.seats:
                seat.t, seat.h = seat.t + 1, 0
            return
        first = self.seats[0]
        before = self.auxiliary()
        went = self.mean([combined(lambda b, y: b - y, self.start(seat), seat.point) for seat in self.seats])
        sent: list[Vec] = []
        for seat in self.seats:  # row 4
            delta = combined(lambda e, b, y: e + (b - y), seat.e, self.start(seat), seat.point)
            sent.append(self.compress(delta, seat.t))
            seat.e = combined(lambda d, c: d - c.astype(np.float64), delta, sent[-1])
        u = combined(lambda v: v.astype(np.float64), self.mean(sent))  # row 5
        s = first.s
        if self.options.double and first.t >= self.options.warmup:  # row 5'
            total = combined(np.add, s, u)
            u = combined(lambda v: v.astype(np.float64), self.compress(total, first.t))
            s = combined(np.subtract, total, u)
        for seat in self.seats:  # row 6
            seat.x = combined(np.subtract, seat.x, u)
            seat.s = copy.deepcopy(s)
            seat.t, seat.h, seat.consolidated = seat.t + 1, 0, False
            if self.options.feedback == "none":
                seat.e, seat.s = zeros(seat.names), zeros(seat.names)
        if self.options.feedback != "none" and self.options.compressor != "fp16":
            after = combined(np.add, self.auxiliary(), went)
            self.checks.append(max(float(np.abs(after[n] - before[n]).max()) for n in after))
        self.begin_round()

    def auxiliary(self) -> Vec:
        """x~ = x - (s + mean e)."""
        e = self.mean([seat.e for seat in self.seats])
        return combined(lambda x, s, m: x - (s + m), self.seats[0].x, self.seats[0].s, e)

    def begin_round(self) -> None:
        """Rows 1 and 2."""
        p = self.options.period
        if p is not None and (self.seats[0].t + 1) % p == 0:
            self.average_errors()
        for seat in self.seats:
            seat.point = self.start(seat)

    def average_errors(self) -> None:
        """Row 1."""
        e = self.mean([seat.e for seat in self.seats])
        for seat in self.seats:
            seat.e = copy.deepcopy(e)

    def local_step(self, gradients: Sequence[dict[str, Array | None]]) -> None:
        """Row 3 on every rank, at its point."""
        for seat, slopes in zip(self.seats, gradients, strict=True):
            for name in seat.names:
                slope = slopes.get(name)
                if slope is not None:
                    flat = seat.steps.step(NAMES.index(name), seat.point[name], slope, seat.lr)
                    seat.point[name] = flat
            seat.h += 1
            if self.options.averages_gradients:
                seat.x = copy.deepcopy(seat.point)

    # -- what all agree on first ----------------------------------------------------------------------

    def settle(self) -> None:
        """Where x, e and s come from. Raises Refused for what all should refuse."""
        size, seats = len(self.seats), self.seats
        if len({seat.names for seat in seats}) > 1:
            raise everywhere(size, "ConfigurationMismatchError")
        loaded = [seat for seat in seats if seat.source == "loaded"]
        new = [seat for seat in seats if seat.source == "parameters"]
        if len(loaded) == size:
            self._go_on_as_loaded()
        elif loaded:
            for seat in seats:
                self._take_from(loaded[0], seat)
        elif new:
            x, t = copy.deepcopy(new[0].x), seats[0].t
            for seat in seats:
                if len(new) < size:
                    seat.x = copy.deepcopy(x)
                seat.t = t
                seat.clear()
        if any(seat.x[n].tobytes() != seats[0].x[n].tobytes() for seat in seats for n in seat.names):
            raise everywhere(size, "ConsensusError")
        for seat in seats:
            seat.source, seat.taken = "kept", True
            seat.mode = "either" if loaded and seat.mode == "visit" else seat.mode

    def _go_on_as_loaded(self) -> None:
        if len({(seat.t, seat.h) for seat in self.seats}) > 1:
            raise everywhere(len(self.seats), "ConfigurationMismatchError")
        if not all(seat.own for seat in self.seats):
            for seat in self.seats:
                seat.e = zeros(seat.names)
                if self.options.sharded:
                    seat.s = zeros(seat.names)
                if not seat.h:
                    seat.point = self.start(seat)

    def _take_from(self, root: Seat, seat: Seat) -> None:
        seat.x, seat.t, seat.h = copy.deepcopy(root.x), root.t, 0
        kept = root.consolidated
        seat.e = copy.deepcopy(root.e) if kept else zeros(root.names)
        seat.s = copy.deepcopy(root.s) if kept or not self.options.sharded else zeros(root.names)
        seat.point = self.start(seat)
