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
    under: Options
    """The options under which this came about."""
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
    saver: int | None = None
    """The worker whose errors these are, where a state was loaded and not yet agreed on."""
    own: bool = True
    """Whether that is this worker."""
    consolidated: bool = False
    reached: bool = False
    """Whether what was loaded was between local steps."""
    held: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The stretch of each parameter's s that what was loaded holds: the rest of `s` is 0."""
    buckets: list[tuple[str, ...]] = field(default_factory=list)
    """The parameters that travel together."""
    written: set[str] = field(default_factory=set)
    """What was written by hand since the round began."""
    skipped: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that take part."""
        return tuple(self.x)

    def clear(self) -> None:
        """X is the point from now on, without errors."""
        self.e, self.s = zeros(self.names), zeros(self.names)
        self.h, self.consolidated, self.own, self.saver, self.reached = 0, False, True, None, False
        self.point, self.written = copy.deepcopy(self.x), set()

    def join(self, name: str, value: Array) -> None:
        """A parameter takes part from now on, without errors."""
        self.x[name], self.point[name] = value.copy(), value.copy()
        self.e[name], self.s[name] = np.zeros_like(value), np.zeros_like(value)
        self.held[name] = (0, value.size)
        self.consolidated = False

    def lay_out(self, names: Sequence[str], small: bool) -> None:
        """Parameters join: in buckets of their own, once x was taken."""
        laid = list(names if self.taken else self.names)
        cut: list[tuple[str, ...]] = [(name,) for name in laid] if small else [tuple(laid)]
        self.buckets = [*self.buckets, *cut] if self.taken else cut

    def moved_by_hand(self, values: Vec) -> None:
        """Somebody wrote to the parameters at the training point."""
        self.written |= {
            name for name, value in values.items() if not np.array_equal(value, self.point[name])
        }
        self.point |= values
        if not self.taken or self.source == "parameters":  # x is still to be taken from what is there
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
    return Seat(copied[0], zeros(values), zeros(values), copied[1], LocalOptimizer(setup), options)


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

    def start(self, seat: Seat, under: Options | None = None) -> Vec:
        """Row 2's b, with these options or with those of now."""
        alpha, beta = (under or self.options).ahead
        return combined(lambda x, e, s: x - alpha * e - beta * s, seat.x, seat.e, seat.s)

    def compress(self, vector: Vec, t: int) -> Vec:
        """C: the identity while it is warm-up."""
        if t < self.options.warmup or self.options.compressor == "none":
            return copy.deepcopy(vector)
        if self.options.compressor == "fp16":
            # As torch does: double numbers become float32 on the way.
            return combined(lambda v: v.astype(np.float32).astype(np.float16), vector)
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
            seat.point, seat.written = self.start(seat), set()

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
        if len({(seat.names, tuple(seat.buckets)) for seat in seats}) > 1:
            raise everywhere(size, "ConfigurationMismatchError")
        loaded = [seat for seat in seats if seat.source == "loaded"]
        new = [seat for seat in seats if seat.source == "parameters"]
        if len(loaded) == size:
            self._go_on_as_loaded()
        elif loaded:
            root = copy.deepcopy(loaded[0])
            for seat in seats:
                self._take_from(root, seat)
            loaded[0].consolidated = root.consolidated and self.options.double
        elif new:
            x, t = copy.deepcopy(new[0].x), new[0].t
            for seat in seats:
                if len(new) < size:
                    seat.x = copy.deepcopy(x)
                seat.t = t
                seat.clear()
        if any(seat.x[n].tobytes() != seats[0].x[n].tobytes() for seat in seats for n in seat.names):
            raise everywhere(size, "ConsensusError")
        for seat in seats:
            seat.source, seat.taken, seat.under = "kept", True, self.options
            seat.own, seat.saver, seat.reached = True, None, False
            seat.mode = "either" if loaded and seat.mode == "visit" else seat.mode

    def _go_on_as_loaded(self) -> None:
        """Each from its own, or from what they have of others'. x~ stays, but for what is lost."""
        seats, now = self.seats, self.options
        if len({(seat.t, seat.h) for seat in seats}) > 1:
            raise everywhere(len(seats), "ConfigurationMismatchError")
        if now.averages_gradients:
            return
        own = all(seat.own or seat.consolidated for seat in seats)
        folds = not now.double and any(seat.under.double for seat in seats)
        moved = [self.updates(seat) for seat in seats]
        consolidated = all(seat.consolidated for seat in seats)
        begins = not own or folds or any(seat.under.ahead != now.ahead for seat in seats)
        whole = {name: self.collected(name) for name in seats[0].names}
        lost = any(s is None for s in whole.values())
        for seat, update in zip(seats, moved, strict=True):
            seat.consolidated = consolidated and not begins
            goes_on = seat.reached or seat.h > 0 or not same(seat.point, self.start(seat))
            s = {name: np.zeros_like(seat.x[name]) if lost or v is None else v for name, v in whole.items()}
            seat.e = seat.e if own else zeros(seat.names)
            if folds:
                seat.e, s = combined(np.add, seat.e, s), zeros(seat.names)
            seat.s = copy.deepcopy(s)
            if begins:
                seat.e = combined(np.add, seat.e, update)
            if begins or not goes_on:
                seat.h, seat.point = 0, self.start(seat)

    def updates(self, seat: Seat) -> Vec:
        """What the local steps of a loaded state have moved, and what was written by hand since."""
        return combined(np.subtract, self.start(seat, seat.under if seat.reached else None), seat.point)

    def collected(self, name: str) -> Array | None:
        """The whole s of a parameter from what the ranks have loaded; None if some is missing."""
        flat = np.full(self.seats[0].x[name].size, np.nan)
        for seat in self.seats:
            first, end = seat.held.get(name, (0, 0)) if seat.under.double else (0, flat.size)
            flat[first:end] = seat.s[name].reshape(-1)[first:end]
        return None if np.isnan(flat).any() else flat.reshape(self.seats[0].x[name].shape)

    def _take_from(self, root: Seat, seat: Seat) -> None:
        """From the one rank that was loaded: its local steps are a part of everyone's error."""
        if self.options.averages_gradients:
            seat.t, seat.h = root.t, 0
            return
        update = self.updates(root)
        seat.x, seat.t, seat.h = copy.deepcopy(root.x), root.t, 0
        kept = root.consolidated
        seat.consolidated = False
        seat.e = copy.deepcopy(root.e) if kept else zeros(root.names)
        seat.s = zeros(root.names)
        for bucket in root.buckets:
            whole = all(root.held.get(name, (0, 0)) == (0, root.x[name].size) for name in bucket)
            if whole and root.under.double:
                seat.s |= {name: root.s[name].copy() for name in bucket}
        if not self.options.double:
            seat.e, seat.s = combined(np.add, seat.e, seat.s), zeros(root.names)
        seat.e = combined(np.add, seat.e, update)
        seat.point = self.start(seat)


def same(one: Vec, other: Vec) -> bool:
    """Whether these are the same numbers."""
    return all(np.array_equal(one[name], other[name]) for name in one)
