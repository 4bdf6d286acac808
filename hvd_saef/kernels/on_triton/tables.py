"""Tables from which one launch learns where everything lies, however many tensors a bucket has. Local.

A table is made once for given addresses and kept, since a bucket's memory does not move. The arguments are
checked when it is made.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hvd_saef.kernels.on_triton.seen import Seen, SeenPoints
from hvd_saef.kernels.operations import Stretch
from hvd_saef.kernels.pieces import named

NUMBERS = (torch.float32, torch.float64)
KEPT_TABLES = 1 << 14
"""How many tables are kept, more than a model needs: the least recently used ones go, with their memory."""
KINDS = {torch.float16: 1, torch.bfloat16: 2}
"""The numbers of the dtypes of points other than x's own, as in `device/common.py`."""


INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if Triton's interpreter runs the kernels, on the CPU."""
_TURN = threading.Lock()
"""Held at each launch: a first one compiles, and nothing says that Triton may do that in two threads at once;
and while a kernel runs, the interpreter changes Triton's functions, which are those of all threads."""


PER_WARP = 2 if torch.version.hip else 1
"""A warp's threads, in units of 32: AMD's have 64."""


class Sections(NamedTuple):
    """Where a run's part of a payload lies: bytes before its numbers, and before its bits or offsets."""

    head: int
    tail: int
    mark: int
    """What is known by its place of the run's first block: the place of its scale, or of its page counts."""
    step: int
    """How far apart the marks of two neighbouring blocks are."""


Format = Callable[[Sequence[Sequence[int]], int], tuple[Sequence[Sections], int]]
"""Returns the sections of each of the runs (rows of the operations' `runs`), and the payload's bytes. The
second argument is the bytes of a number."""


class SeenStretch(NamedTuple):
    """What the tables must know of a stretch, but for its payloads."""

    runs: bytes
    memory: Seen
    other: Seen | None
    s: Seen | None
    points: SeenPoints

    @classmethod
    def of(cls, stretch: Stretch) -> SeenStretch:
        """Looks at a stretch."""
        table = stretch.runs
        right = table.is_cpu and table.dtype is torch.int64 and table.dim() == 2 and table.is_contiguous()
        if not right or table.shape[1] != 4:
            raise ValueError("runs: a contiguous int64 tensor [n, 4] on the CPU is needed")
        other, s = (None if one is None else Seen.of(one) for one in (stretch.other, stretch.s))
        runs = table.numpy().tobytes()
        return cls(runs, Seen.of(stretch.memory), other, s, SeenPoints.of(stretch.points))

    def check(self, numel: int, form: Form) -> int:
        """Returns `numel`; raises ValueError unless the memories have so many elements and one dtype."""
        if self.memory.dtype not in NUMBERS:
            raise ValueError(f"float32 or float64 is needed, not {named(self.memory.dtype)}")
        device = self.memory.device
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"{form.names[0]}: a tensor on a GPU is needed, or on the CPU")
        for one, name in zip((self.memory, self.other, self.s), (*form.names, "s"), strict=True):
            if one is not None:
                one.flat(name, (self.memory.dtype,), numel, device)
        return numel


class Form(NamedTuple):
    """Everything that a table depends on."""

    stretches: tuple[SeenStretch, ...]
    names: tuple[str, str]
    """The names of memory and `other` in error messages."""
    format: Format
    number: int
    """The bytes of a number that travels."""
    most: int
    """The largest number of elements of a program."""
    columns: int
    """The payloads of a stretch."""


@dataclass(frozen=True)
class Tables:
    """The tables of one launch, on the device of the memory."""

    runs: Tensor
    """int64, a row a run: see the columns in `device/common.py`."""
    run_of: Tensor
    """int32, by program: the row of its run."""
    blocks: Tensor
    """int64, a row for each block that has several programs and does not travel whole: the first of its
    stretch's payload addresses, its mark, its elements, its first program among those of all these blocks,
    how many it has, and how many elements travel."""
    partials: int
    """The programs of all blocks that have several."""
    narrow: bool
    """True if some points have another dtype than x."""
    largest: int
    """The elements of the largest block."""
    payload_bytes: tuple[int, ...]
    """Of each stretch."""
    aligned: bool
    """True if all numbers in payloads lie at multiples of their bytes, if the payloads begin at such."""


def filled(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Returns the stretches that have any elements."""
    return [stretch for stretch in stretches if stretch.memory.numel()]


def form_of(
    stretches: Sequence[Stretch],
    names: tuple[str, str],
    form: Format,
    number: int,
    most: int,
    columns: int,
) -> Form:
    """Returns what the table for `stretches` depends on."""
    return Form(tuple(map(SeenStretch.of, stretches)), names, form, number, most, columns)


@functools.lru_cache(KEPT_TABLES)
def tables_of(form: Form) -> Tables:
    """Returns the tables for `form`; raises ValueError if the tensors do not fit each other."""
    made = _Rows(form)
    for nth in range(len(form.stretches)):
        made.add(nth)
    device = form.stretches[0].memory.device
    numbers, programs = torch.arange(len(made.rows), dtype=torch.int32), torch.tensor(made.programs)
    return Tables(
        torch.tensor(made.rows, dtype=torch.int64).to(device),
        torch.repeat_interleave(numbers, programs.to(torch.int64)).to(device),
        torch.tensor(made.blocks, dtype=torch.int64).view(-1, 6).to(device),
        made.partials,
        made.narrow,
        made.largest,
        tuple(made.payload_bytes),
        made.aligned,
    )


class _Rows:
    """The rows of the tables for one form, as they are made."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.rows: list[list[int]] = []
        self.blocks: list[list[int]] = []
        self.programs: list[int] = []  # of each run
        self.payload_bytes: list[int] = []
        self.first = self.partials = self.largest = 0
        self.narrow, self.aligned = False, True

    def add(self, nth: int) -> None:
        """Adds the runs of stretch number `nth`."""
        form, stretch = self.form, self.form.stretches[nth]
        runs = _checked_runs(stretch.runs)
        numel = runs[-1][0] + runs[-1][1] * runs[-1][2] if runs else 0
        places = _places(stretch, runs, stretch.check(numel, form))
        self.narrow = self.narrow or any(kind for _, kind in places)
        sections, length = form.format(runs, form.number)
        self.payload_bytes.append(length)
        item, columns = stretch.memory.dtype.itemsize, nth * form.columns
        memories = (stretch.memory, stretch.other, stretch.s)
        for (start, size, count, kept), place, section in zip(runs, places, sections, strict=True):
            each = -(-size // form.most)
            addresses = [0 if one is None else one.address + start * item for one in memories]
            where = [section.head, section.tail, section.mark, columns]
            own = [self.first, each, self.partials, len(self.blocks)]
            self.rows.append([*addresses, *place, size, kept, *where, *own])
            self.programs.append(count * each)
            self.first += count * each
            self.largest = max(self.largest, size)
            self.aligned = self.aligned and section.head % form.number == 0
            if each > 1 and kept < size:
                for block in range(count):
                    mark = section.mark + block * section.step
                    self.blocks.append([columns, mark, size, self.partials + block * each, each, kept])
                self.partials += count * each


def _checked_runs(table: bytes) -> list[list[int]]:
    """Returns the runs; raises ValueError unless they follow one another without gaps from element 0."""
    numbers = array("q", table).tolist()
    runs = [numbers[i : i + 4] for i in range(0, len(numbers), 4)]
    element = 0
    for start, size, count, kept in runs:
        if start != element or size <= 0 or count <= 0 or not 0 <= kept <= size:
            raise ValueError(f"runs: row {(start, size, count, kept)} after element {element}")
        element += size * count
    return runs


def _places(stretch: SeenStretch, runs: list[list[int]], numel: int) -> list[tuple[int, int]]:
    """Returns the address of each run's first point and the number of its dtype; zeros without points."""
    points, dtype = stretch.points, stretch.memory.dtype
    if not points:
        return len(runs) * [(0, 0)]
    narrow = tuple(KINDS) if dtype is torch.float32 else ()
    for piece in points:
        piece.flat("points", (dtype, *narrow), math.prod(piece.shape), stretch.memory.device)
    starts = list(itertools.accumulate((piece.shape[0] for piece in points), initial=0))
    if starts[-1] != numel:
        raise ValueError(f"points have {starts[-1]} elements; {numel} are needed")
    places = []
    for start, size, count, _ in runs:
        nth = bisect.bisect_right(starts, start, hi=len(points)) - 1
        if start + size * count > starts[nth + 1]:
            raise ValueError(f"points: the run from element {start} does not lie within one piece")
        piece = points[nth]
        offset = (start - starts[nth]) * piece.dtype.itemsize
        places.append((piece.address + offset, KINDS.get(piece.dtype, 0)))
    return places


class Given(NamedTuple):
    """A table of payload addresses: of each stretch its own, then those that are added."""

    addresses: Tensor
    columns: int
    aligned: bool
    """True if each payload begins at a multiple of a number's bytes."""


def addresses_of(stretches: Sequence[Stretch], name: str, lengths: Sequence[int], number: int) -> Given:
    """Returns the addresses of the payloads; raises ValueError if one has not the length of its stretch."""
    seen = tuple(
        (None if stretch.payload is None else Seen.of(stretch.payload), *map(Seen.of, stretch.payloads))
        for stretch in stretches
    )
    return _addresses(seen, name, tuple(lengths), number, stretches[0].memory.device)


@functools.lru_cache(KEPT_TABLES)
def _addresses(
    seen: tuple[tuple[Seen | None, ...], ...],
    name: str,
    lengths: tuple[int, ...],
    number: int,
    device: torch.device,
) -> Given:
    if len({len(row) for row in seen}) > 1:
        raise ValueError("payloads: the same number for each of the stretches is needed")
    for row, length in zip(seen, lengths, strict=True):
        for nth, one in enumerate(row):
            if one is not None:
                one.flat("payloads" if nth else name, (torch.uint8,), length, device)
    addresses = [0 if one is None else one.address for row in seen for one in row]
    table = torch.tensor(addresses, dtype=torch.int64).to(device)
    return Given(table, len(seen[0]), all(address % number == 0 for address in addresses))


@functools.lru_cache(KEPT_TABLES)
def numbers_of(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the numbers in memory of the device, rounded to `dtype`."""
    return torch.tensor(numbers, dtype=torch.float64).to(dtype).to(device)


def launch(
    kernel: Any, programs: int | tuple[int, int], *arguments: Any, warps: int, **constants: Any
) -> None:
    """Launches a kernel on the device of its first argument, without fused multiply-add.

    Each program has 32 threads for each of the `warps`.
    """
    grid = programs if isinstance(programs, tuple) else (programs,)
    if 0 not in grid:
        with _TURN, torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]  # nothing, on the CPU
            kernel[grid](*arguments, **constants, num_warps=max(1, warps // PER_WARP), enable_fp_fusion=False)
