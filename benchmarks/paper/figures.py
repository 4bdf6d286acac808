"""Draws counterparts of the paper's Figures 1 to 3, and one of the transformer, from the CSVs of runs.

    python -m benchmarks.paper.figures --runs benchmarks/paper/results/small

Lines are means over seeds, shades one standard deviation, as in the paper.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.comparison import RESULTS, Runs, deviation, load_runs, mean
from benchmarks.paper.presets import (
    BETA,
    EF_PERIODS,
    PLAIN,
    SAEF_PERIODS,
    SAME_BUDGET,
    SIGN_MOMENTUM,
    SINGLE_WAY,
    SPARSE,
    SPARSE_AVERAGED,
)
from benchmarks.paper.rows import Row, accuracy, test_loss, training_loss
from benchmarks.pictures import save

Measure = Callable[[Row], float | None]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    task: str
    methods: tuple[str, ...]
    y: Measure
    label: str
    against_bytes: bool = False
    log: bool = False
    dashed: Measure | None = None
    """Drawn beside it in the same color, dashed."""


def auxiliary_training_loss(row: Row) -> float | None:
    """At x̃."""
    return row.auxiliary_training_loss


def own_bound(row: Row) -> float | None:
    """The paper's bound for the method's own feedback: Eq. 9 for EF, Eq. 10 for SAEF."""
    return row.mismatch_bound_ef if row.method.startswith("EF") else row.mismatch_bound_saef


def exact_mismatch(row: Row) -> float | None:
    """What the bound bounds, up to a factor of 2."""
    return row.mismatch_exact


LOSS, ACCURACY, VALIDATION = "training loss", "test accuracy, %", "validation loss"
EF, SAEF = SIGN_MOMENTUM[1:]
SIGN = (*SIGN_MOMENTUM, BETA[0])
SPARSE_AVERAGINGS = (*SPARSE[1:], SAME_BUDGET, SPARSE_AVERAGED)
AVERAGED = ("SGDM", SAEF, SAEF_PERIODS[1], BETA[1])
ADAM = (
    "AdamW",
    "Local-AdamW",
    "EF-SignAdamW-DC",
    "SAEF-SignAdamW-DC",
    "SAEF-SignAdamW-DC beta=1",
    "Local-AdamW rate=2",
    "SAEF-SignAdamW-DC beta=1 rate=2",
)
LOCAL = (
    "SAEF-SignAdamW-DC beta=1",
    "SAEF-SignAdamW-DC beta=1 H=4",
    "SAEF-SignAdamW-DC beta=1 H=16",
    "Local-AdamW H=4",
    "Local-AdamW H=16",
)
GRADIENTS = (
    "AdamW",
    "SAEF-SignAdamW-DC beta=1",
    "EF-SignAdamW-DC",
    "GradientEF-SignAdamW-SC",
    "GradientEF-SignAdamW-SC rate=0.25",
)
RATES = tuple(
    name
    for method, factors in (("AdamW", ("0.5", "2")), ("SAEF-SignAdamW-DC beta=1", ("0.5", "2", "4")))
    for name in (method, *(f"{method} rate={factor}" for factor in factors))
)
TOP_K = ("AdamW", "Local-AdamW", "EF-AdamW-DC-TopK1%", "SAEF-AdamW-DC-TopK1%")


def pair(title: str, task: str, methods: tuple[str, ...], against_bytes: bool = False) -> tuple[Panel, ...]:
    """Training loss and test accuracy of the same methods."""
    return (
        Panel(title, task, methods, training_loss, LOSS, against_bytes),
        Panel(title, task, methods, accuracy, ACCURACY, against_bytes),
    )


FIGURES: dict[str, tuple[tuple[Panel, ...], ...]] = {
    "figure1": (
        (*pair("momentum, sign, DC", "resnet8", SIGN), *pair("plain SGD, sign", "resnet8-plain", PLAIN)),
        (
            *pair("8 workers, Top-K", "resnet8-8", SPARSE),
            *pair("8 workers, Top-K", "resnet8-8", SPARSE, against_bytes=True),
        ),
        (
            *pair("momentum, sign, SC", "resnet8", ("SGDM", *SINGLE_WAY)),
            *pair("momentum, sign, DC", "resnet8", SIGN, against_bytes=True),
        ),
    ),
    "figure2": (
        (
            *pair("error averaging", "resnet8", AVERAGED),
            *pair("error averaging", "resnet8", AVERAGED, against_bytes=True),
        ),
        (
            *pair("8 workers, Top-K, averaging", "resnet8-8", SPARSE_AVERAGINGS),
            *pair("8 workers, Top-K, averaging", "resnet8-8", SPARSE_AVERAGINGS, against_bytes=True),
        ),
    ),
    "figure3": (
        (
            Panel("error averaging in EF", "resnet8", (EF, *EF_PERIODS), training_loss, LOSS),
            Panel("error averaging in SAEF", "resnet8", (SAEF, *SAEF_PERIODS), training_loss, LOSS),
            Panel(
                "x, and dashed x̃",
                "resnet8",
                SIGN[1:],
                training_loss,
                LOSS,
                dashed=auxiliary_training_loss,
            ),
            Panel(
                "gradient mismatch: the paper's bound,\nand dashed the exact value",
                "resnet8",
                (*SIGN[1:], SAEF_PERIODS[1]),
                own_bound,
                "mean over the epoch",
                log=True,
                dashed=exact_mismatch,
            ),
        ),
    ),
    "transformer": (
        (
            Panel("AdamW", "decoder", ADAM, test_loss, VALIDATION),
            Panel("AdamW", "decoder", ADAM, test_loss, VALIDATION, against_bytes=True),
            Panel("feedback on gradients", "decoder", GRADIENTS, test_loss, VALIDATION),
        ),
        (
            Panel("rates, of 8e-3", "decoder", RATES, test_loss, VALIDATION),
            Panel("local steps", "decoder", LOCAL, test_loss, VALIDATION),
            Panel("Top-K", "decoder", TOP_K, test_loss, VALIDATION),
        ),
    ),
}


def draw(panel: Panel, axes: Any, runs: Runs) -> None:
    """The panel's lines, of the methods that there are runs of, each in the color of its place."""
    for place, method in enumerate(panel.methods):
        epochs = runs.get((panel.task, method), {})
        if not epochs:
            continue
        drawn: list[tuple[Measure, dict[str, Any]]] = [(panel.y, {"label": method})]
        if panel.dashed:
            drawn.append((panel.dashed, {"linestyle": "--"}))
        color = f"C{place}"
        for y, style in drawn:
            points = [(x_of(panel, rows, epoch), values(rows, y)) for epoch, rows in epochs.items()]
            points = [(x, group) for x, group in points if group]
            across = [x for x, _ in points]
            middle = [mean(group) for _, group in points]
            spread = [deviation(group) for _, group in points]
            axes.plot(across, middle, color=color, linewidth=1.3, **style)
            low = [m - s for m, s in zip(middle, spread, strict=True)]
            high = [m + s for m, s in zip(middle, spread, strict=True)]
            axes.fill_between(across, low, high, color=color, alpha=0.2, linewidth=0)
    axes.set(title=panel.title, ylabel=panel.label)
    axes.set(xlabel="MB sent by a worker" if panel.against_bytes else "epoch")
    if panel.against_bytes:
        axes.set_xscale("log")
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.log:
        axes.set_yscale("log")
    if axes.lines:
        axes.legend(fontsize=6)


def x_of(panel: Panel, rows: Sequence[Row], epoch: int) -> float:
    """Where the rows of an epoch stand."""
    return mean([row.bytes_sent for row in rows]) / 1e6 if panel.against_bytes else float(epoch)


def values(rows: Iterable[Row], y: Measure) -> list[float]:
    """The seeds' values, of those that have one."""
    return [value for value in map(y, rows) if value is not None]


def draw_figure(name: str, runs: Runs, folder: Path) -> Path:
    """One figure as a PNG in `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grid = FIGURES[name]
    figure, all_axes = pyplot.subplots(
        len(grid), len(grid[0]), figsize=(4.2 * len(grid[0]), 3.3 * len(grid)), squeeze=False
    )
    for panels, line in zip(grid, all_axes, strict=True):
        for panel, axes in zip(panels, line, strict=True):
            draw(panel, axes, runs)
    figure.tight_layout()
    path = folder / f"{name}.png"
    save(figure, path)
    return path


def main() -> None:
    """Draw what the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=Path, default=RESULTS, help="folder with the runs' CSVs")
    parser.add_argument("--out", type=Path, help="folder for the figures; that of the runs if not given")
    args = parser.parse_args()
    runs = load_runs(args.runs)
    for name in FIGURES:
        print(draw_figure(name, runs, args.out or args.runs))


if __name__ == "__main__":
    main()
