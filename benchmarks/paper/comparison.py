"""Says what runs show about the paper's claims, in numbers: python -m benchmarks.paper.comparison.

Means over seeds, with standard deviations where there are several; differences are paired by seed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.paper.presets import (
    ADAM,
    BETA,
    EF_PERIODS,
    PLAIN,
    PRESETS,
    SAEF_PERIODS,
    SAME_BUDGET,
    SIGN_MOMENTUM,
    SINGLE_WAY,
    SPARSE,
    SPARSE_AVERAGED,
)
from benchmarks.paper.rows import Row, accuracy, read, test_loss, training_loss

RESULTS = Path(__file__).parent / "results" / "small"
TASKS = {group.task.name: group.task for preset in PRESETS.values() for group in preset.groups}
Runs = dict[tuple[str, str], dict[int, list[Row]]]
"""By task and method: epoch -> a row a seed."""


def load_runs(folder: Path, unfinished: bool = False) -> Runs:
    """All finished runs in a folder, and with `unfinished` the epochs that others have reached."""
    runs: Runs = {}
    for path in sorted(folder.glob("*/*.csv")):
        rows = read(path)
        if rows and (unfinished or len(rows) == TASKS[rows[0].task].epochs):
            for row in rows:
                runs.setdefault((row.task, row.method), {}).setdefault(row.epoch, []).append(row)
    return runs


def mean(values: Sequence[float]) -> float:
    """The mean over seeds."""
    return statistics.fmean(values)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation over seeds; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


Value = Callable[[Row], float | None]
METHODS = {
    "resnet8": (*SIGN_MOMENTUM, *BETA, *SINGLE_WAY, *EF_PERIODS, *SAEF_PERIODS),
    "resnet8-plain": PLAIN,
    "resnet8-8": (*SPARSE, SPARSE_AVERAGED, SAME_BUDGET),
    "decoder": tuple(sorted(ADAM)),
}
"""By task, in the order of the tables' lines."""
IMAGES = (("Training loss at x", training_loss, 3), ("Test accuracy at x, %", accuracy, 1))
METRICS = {"decoder": (("Validation loss at x", test_loss, 3),)}
"""By task: titles, values, digits; IMAGES of the others."""
SGDM, EF, SAEF = SIGN_MOMENTUM
PAIRS = (
    *(("resnet8", SAEF, theirs) for theirs in (SGDM, EF)),
    ("resnet8", EF, SGDM),
    *(("resnet8", BETA[0], theirs) for theirs in (SAEF, SGDM, EF)),
    *(("resnet8", BETA[1], theirs) for theirs in (BETA[0], SGDM)),
    *(("resnet8", SINGLE_WAY[1], theirs) for theirs in (SINGLE_WAY[0], SGDM, SAEF)),
    ("resnet8", SINGLE_WAY[0], SGDM),
    *(("resnet8", method, EF) for method in EF_PERIODS),
    *(("resnet8", method, SAEF) for method in SAEF_PERIODS),
    *(("resnet8-plain", method, "SGD") for method in PLAIN[1:]),
    *(("resnet8-plain", f"SA{theirs}", theirs) for theirs in (PLAIN[1], PLAIN[3])),
    ("resnet8-8", SPARSE[1], SPARSE[0]),
    *(("resnet8-8", ours, theirs) for ours in (SPARSE[2], SPARSE_AVERAGED) for theirs in SPARSE[:2]),
    *(("resnet8-8", SAME_BUDGET, theirs) for theirs in SPARSE[1:]),
)
"""Task, ours, theirs: what is compared seed by seed."""
BUDGETS = {
    "resnet8": (2.5, 5, 10, 13.5, 27, 71, 141, 425),
    "resnet8-8": (1.5, 3, 4.5, 6, 9, 42, 494),
    "decoder": (10, 33, 66, 132, 530, 2101),
}
"""MB, by task."""
MEASURED = {
    "resnet8": ((EF, SAEF), (EF, SAEF, BETA[0], *EF_PERIODS, *SAEF_PERIODS, *SINGLE_WAY)),
    "resnet8-plain": (PLAIN[1:],),
    "resnet8-8": ((*SPARSE[1:], SPARSE_AVERAGED, SAME_BUDGET),),
    "decoder": (("EF-SignAdamW-DC", "SAEF-SignAdamW-DC", "SAEF-SignAdamW-DC beta=1"),),
}
"""By task, groups of methods whose mismatch is compared over the seeds that all of them have; EF first."""


def early(task: str) -> range:
    """The epochs before the first cut; all, where there is none."""
    return range(1, (*TASKS[task].cuts, TASKS[task].epochs)[0] + 1)


def cell(rows: Sequence[Row], value: Value, digits: int) -> str:
    """A mean and its deviation."""
    numbers = [number for number in map(value, rows) if number is not None]
    if not numbers:
        return "-"
    spread = f" ±{deviation(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.{digits}f}{spread}"


def table(
    title: str, runs: Runs, task: str, methods: Sequence[str], value: Value, digits: int = 3
) -> Iterator[str]:
    """A method a line, an epoch a column."""
    there = [method for method in methods if (task, method) in runs]
    if not there:
        return
    epochs = sorted(runs[task, there[0]])
    cells = {m: [cell(runs[task, m][epoch], value, digits) for epoch in epochs] for m in there}
    width = 1 + max(len(text) for line in cells.values() for text in line)
    yield f"{title} ({task})"
    yield f"{'after epoch':<37}seeds" + "".join(f"{epoch:>{width}}" for epoch in epochs)
    for method, line in cells.items():
        seeds = len(runs[task, method][epochs[0]])
        yield f"  {method:<35}{seeds:>5}" + "".join(f"{text:>{width}}" for text in line)
    yield ""


def paired(runs: Runs, task: str, ours: str, theirs: str, epoch: int, value: Value) -> list[float]:
    """Ours minus theirs, for each seed that both have."""
    mine, others = ({row.seed: value(row) for row in runs[task, m][epoch]} for m in (ours, theirs))
    pairs = [(mine[seed], others[seed]) for seed in sorted(mine) if seed in others]
    return [a - b for a, b in pairs if a is not None and b is not None]


def against(runs: Runs, reached: Runs, task: str, ours: str, theirs: str) -> Iterator[str]:
    """Who has the lower training loss and the better accuracy, before the first cut and at the end.

    Before the cut, unfinished runs, which `reached` has as well, count for the epochs they have.
    """
    if (task, ours) not in runs or (task, theirs) not in runs:
        return
    last = max(runs[task, ours])
    for name, value, sign, unit in (
        ("training loss", training_loss, -1, ""),
        ("test accuracy", accuracy, 1, " points"),
    ):
        before = [paired(reached, task, ours, theirs, epoch, value) for epoch in early(task)]
        won = sum(sign * difference > 0 for seeds in before for difference in seeds)
        count = sum(map(len, before))
        end = paired(runs, task, ours, theirs, last, value)
        if not count or not end:
            return
        yield (
            f"{ours} against {theirs} ({task}), {name}: better in {won} of {count} (epoch, seed) pairs "
            f"before the first cut, by {sign * sum(map(sum, before)) / count:+.3f}{unit} on average; "
            f"at the end by {sign * mean(end):+.3f}{unit} (seeds: "
            + ", ".join(f"{sign * difference:+.3f}" for difference in end)
            + ")"
        )


def at_budget(runs: Runs, task: str, methods: Sequence[str], megabytes: Sequence[float]) -> Iterator[str]:
    """The last of the task's metrics at the last epoch that a method finishes within a budget of bytes."""
    title, value, digits = METRICS.get(task, IMAGES)[-1]
    there = [method for method in methods if (task, method) in runs and "Gradient" not in method]  # dense
    if not there:
        return
    yield f"{title}, at the last epoch within so many MB sent by a worker ({task})"
    yield f"{'':<37}MB/epoch" + "".join(f"{budget:>13}" for budget in megabytes)
    for method in there:
        epochs = runs[task, method]
        last = max(epochs)
        line = f"  {method:<35}{epochs[last][0].bytes_sent / 1e6 / last:>8.2f}"
        for budget in megabytes:
            within = [epoch for epoch, rows in epochs.items() if rows[0].bytes_sent <= budget * 1e6]
            line += f"{cell(epochs[max(within)], value, digits) if within else '-':>13}"
        yield line
    yield ""


def common_seeds(runs: Runs, task: str, methods: Sequence[str]) -> set[int]:
    """Those with which every one of the methods has run."""
    return set.intersection(*({row.seed for row in runs[task, method][1]} for method in methods))


def mismatch(runs: Runs, task: str, methods: Sequence[str]) -> Iterator[str]:
    """Mean over the early epochs and the seeds that all have: exact and bound, also relative to the first."""
    there = [method for method in methods if (task, method) in runs]
    if methods[0] not in there:
        return
    seeds = common_seeds(runs, task, there)
    yield f"Gradient mismatch ({task}), mean of epochs 1 to {early(task)[-1]}; of {methods[0]}'s in brackets"
    yield f"{'seeds: ' + ', '.join(map(str, sorted(seeds))):<37}{'exact':>20}{'own bound':>20}" + "".join(
        f"{name:>10}" for name in ("‖s‖²", "Var e", "‖ē‖²", "δ")
    )

    def over(method: str, name: str) -> float:
        rows = [row for epoch in early(task) for row in runs[task, method][epoch] if row.seed in seeds]
        return mean([getattr(row, name) for row in rows])

    for method in there:
        bound = "mismatch_bound_ef" if method.startswith("EF") else "mismatch_bound_saef"
        line = f"  {method:<35}"
        for name, theirs in (("mismatch_exact", "mismatch_exact"), (bound, "mismatch_bound_ef")):
            ratio = over(method, name) / over(methods[0], theirs)
            line += f"{f'{over(method, name):.4f} ({ratio:.2f})':>20}"
        for name in ("server_error", "error_variance", "mean_error", "delta"):
            line += f"{over(method, name):>10.4f}"
        yield line
    yield ""


def gap(runs: Runs, task: str, methods: Sequence[str]) -> Iterator[str]:
    """The training loss at x̃ minus that at x."""

    def difference(row: Row) -> float | None:
        at = row.auxiliary_training_loss
        return None if at is None else at - row.training_loss

    yield from table("Training loss at x̃ minus that at x", runs, task, methods, difference)


def report(runs: Runs, reached: Runs) -> Iterator[str]:
    """All of it."""
    for task, methods in METHODS.items():
        for title, value, digits in METRICS.get(task, IMAGES):
            yield from table(title, runs, task, methods, value, digits)
    for pair in PAIRS:
        yield from against(runs, reached, *pair)
    yield ""
    for task, megabytes in BUDGETS.items():
        yield from at_budget(runs, task, METHODS[task], megabytes)
    for task, groups in MEASURED.items():
        for methods in groups:
            yield from mismatch(runs, task, methods)
        yield from gap(runs, task, groups[-1])


def main() -> None:
    """Print what the CSVs say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper.comparison", description=__doc__)
    parser.add_argument("--runs", type=Path, default=RESULTS, help="folder with the runs' CSVs")
    folder = parser.parse_args().runs
    for line in report(load_runs(folder), load_runs(folder, unfinished=True)):
        print(line)


if __name__ == "__main__":
    main()
