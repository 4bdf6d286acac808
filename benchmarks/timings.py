"""What a timed turn of a method left behind: as CSV, as a table, as a plot."""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pictures import save

BASELINE = "Horovod float32"
"""The method whose time all others are compared with."""
LOCAL = "no exchange"
"""The method that is the step alone."""


@dataclass(frozen=True)
class Timing:
    """One method in one round. Bytes are of a step, sent by a worker, the mean over workers."""

    model: str
    rate: str
    """Of each worker's link; "memory" where workers are on one host."""
    workers: int
    method: str
    round: int
    steps: int
    seconds: float
    """Of a step."""
    claimed_bytes: float
    """By stats(); NaN for methods that have none."""
    interface_bytes: float
    """By the interface's counter, Horovod's idle traffic subtracted; NaN where it was not read."""
    theory_bytes: float
    added_memory: float
    """Resident bytes by which wrapping and the first steps made a worker grow, the largest over workers;
    NaN in rounds in which it was not built."""


def write(timings: Sequence[Timing], path: Path) -> None:
    """Write a CSV, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Timing)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(timing) for timing in timings)
    unfinished.rename(path)


def read(path: Path) -> list[Timing]:
    """The inverse of :func:`write`."""
    kinds: dict[str, Any] = {"int": int, "float": float, "str": str}
    fields = {field.name: kinds[str(field.type)] for field in dataclasses.fields(Timing)}
    with open(path, newline="") as file:
        return [
            Timing(**{name: fields[name](value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.4f} ({self.low:.4f} to {self.high:.4f})"


def spread(values: Iterable[float]) -> Spread:
    """Of the values that are numbers; NaN where there are none."""
    known = sorted(value for value in values if not math.isnan(value))
    if len(known) < 2:
        return Spread(*3 * (known or [math.nan]))
    low, _, high = statistics.quantiles(known, n=4, method="inclusive")
    return Spread(low, statistics.median(known), high)


class Summary(NamedTuple):
    """One method over all rounds of one piece: one model, rate and number of workers."""

    method: str
    seconds: Spread
    ratio: Spread
    """Horovod float32's time over this one's, round by round: above 1 is faster."""
    added: Spread
    """Seconds over the step without an exchange, round by round."""
    claimed: float
    interface: float
    theory: float
    memory: float


def summarize(timings: Sequence[Timing]) -> list[Summary]:
    """All methods of one piece."""
    by_method: dict[str, dict[int, Timing]] = {}
    for timing in timings:
        by_method.setdefault(timing.method, {})[timing.round] = timing

    def beside(method: str, number: int) -> float:
        other = by_method.get(method, {}).get(number)
        return other.seconds if other else math.nan

    summaries = []
    for method, rounds in by_method.items():
        turns = rounds.values()
        summaries.append(
            Summary(
                method,
                spread(turn.seconds for turn in turns),
                spread(beside(BASELINE, turn.round) / turn.seconds for turn in turns),
                spread(turn.seconds - beside(LOCAL, turn.round) for turn in turns),
                spread(turn.claimed_bytes for turn in turns).median,
                spread(turn.interface_bytes for turn in turns).median,
                spread(turn.theory_bytes for turn in turns).median,
                spread(turn.added_memory for turn in turns).median,
            )
        )
    return summaries


def title(timings: Sequence[Timing]) -> str:
    """What one piece is."""
    first = timings[0]
    rounds = len({timing.round for timing in timings})
    link = "shared memory" if first.rate == "memory" else f"links of {first.rate}"
    return f"{first.model}, {first.workers} workers, {link}: medians of {rounds} rounds (quartiles)"


def table(timings: Sequence[Timing], parameters: int | None = None) -> str:
    """One piece: a method a row. With the number of parameters, memory is in bytes a parameter."""
    unit = "B/parameter" if parameters else "MB"
    lines = [
        title(timings),
        f"{'method':<22}{'seconds a step':>28}{'x faster than float32':>30}{'exchange adds, s':>30}"
        f"{'MB: stats':>12}{'wire':>10}{'theory':>10}{'memory, ' + unit:>22}",
    ]
    lines += [
        f"{row.method:<22}{row.seconds!s:>28}{row.ratio!s:>30}{row.added!s:>30}"
        f"{_cell(row.claimed / 1e6):>12}{_cell(row.interface / 1e6):>10}{_cell(row.theory / 1e6):>10}"
        f"{_cell(row.memory / (parameters or 1e6), 2):>22}"
        for row in summarize(timings)
    ]
    return "\n".join(lines)


def _cell(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def plot(pieces: Sequence[Sequence[Timing]], path: Path) -> None:
    """Bars of seconds a step, a method a row and a piece a panel; lines are quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(pieces))
    rows = math.ceil(len(pieces) / columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(6 * columns, 4 * rows), squeeze=False)
    for axes in grid.flat[len(pieces) :]:
        axes.set_visible(False)
    for axes, timings in zip(grid.flat, pieces, strict=False):
        summaries = summarize(timings)[::-1]
        medians = [row.seconds.median for row in summaries]
        errors = [
            [abs(getattr(row.seconds, end) - row.seconds.median) for row in summaries]
            for end in ("low", "high")
        ]
        colors = [
            "tab:green" if row.method.startswith(("sign", "Top-K")) else "tab:gray" for row in summaries
        ]
        axes.barh([row.method for row in summaries], medians, xerr=errors, color=colors)
        axes.set(xlabel="seconds a step", xscale="log", title=title(timings).split(":")[0])
        axes.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    save(figure, path)
