"""Tables, a CSV and a plot of runs that are compared with each other."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.pictures import save


@dataclass(frozen=True)
class Row:
    """One method after one epoch."""

    seed: int
    method: str
    epoch: int
    training_loss: float
    """At x, over all training images."""
    test_accuracy: float
    """At x, from 0 to 1."""
    bytes_sent: float
    """By a worker since the start, the mean over workers."""
    float32_bytes: float
    """What a float32 ring allreduce would have sent by now."""
    seconds: float
    """Of training since the start, evaluation excluded."""

    def __str__(self) -> str:
        return (
            f"{self.method:<24} seed {self.seed} epoch {self.epoch:>2}  loss {self.training_loss:.4f}  "
            f"accuracy {self.test_accuracy:6.2%}  {self.bytes_sent / 1e6:8.2f} MB sent  {self.seconds:5.1f} s"
        )


class Mean(NamedTuple):
    """A mean over seeds and its standard error (0 for one seed)."""

    value: float
    error: float


def mean(values: Sequence[float]) -> Mean:
    """The mean over seeds."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Mean(statistics.fmean(values), error)


Curves = dict[str, dict[int, list[Row]]]


def curves(rows: Iterable[Row]) -> Curves:
    """Rows by method and epoch, the seeds together."""
    grouped: Curves = {}
    for row in rows:
        grouped.setdefault(row.method, {}).setdefault(row.epoch, []).append(row)
    return grouped


def report(rows: Sequence[Row], folder: Path, cut: int) -> None:
    """Print tables and the summary, and write metrics.csv, summary.txt and quickstart.png."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    grouped = curves(rows)
    text = "\n".join([table(grouped), "", *summary(grouped, cut)])
    (folder / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\n")
    plot(grouped, folder / "quickstart.png")
    print(f"Written: {folder}/metrics.csv, summary.txt, quickstart.png")


def table(grouped: Curves) -> str:
    """An epoch a row: training loss and test accuracy at x, bytes a worker and seconds, by method."""
    lines = []
    for title, cell in (
        ("Training loss at x", loss_of),
        ("Test accuracy at x", lambda group: f"{mean([r.test_accuracy for r in group]).value:.2%}"),
        ("MB sent by a worker", lambda group: f"{mean([r.bytes_sent for r in group]).value / 1e6:.2f}"),
        ("Seconds of training", lambda group: f"{mean([r.seconds for r in group]).value:.1f}"),
    ):
        lines.append(f"{title:<20}" + "".join(f"{method:>25}" for method in grouped))
        epochs = next(iter(grouped.values()))
        lines += [
            f"  after epoch {epoch:>2}    "
            + "".join(f"{cell(groups[epoch]):>25}" for groups in grouped.values())
            for epoch in epochs
        ]
    return "\n".join(lines)


def loss_of(group: Sequence[Row]) -> str:
    """The mean loss, with its standard error where there is one."""
    value, error = mean([row.training_loss for row in group])
    return f"{value:.4f} ± {error:.4f}" if len(group) > 1 else f"{value:.4f}"


def summary(grouped: Curves, cut: int) -> list[str]:
    """Compression ratios, and who was ahead when."""
    lines = []
    for method, groups in grouped.items():
        last = groups[max(groups)][0]
        if 0 < last.bytes_sent < last.float32_bytes:
            ratio = last.float32_bytes / last.bytes_sent
            lines.append(f"{method:<25} sends 1/{ratio:.1f} of what a float32 ring allreduce sends")
    epochs = sorted(next(iter(grouped.values())))
    for epoch in epochs:
        ranking = sorted(grouped, key=lambda method: mean_loss(grouped, method, epoch).value)
        lines.append(f"lowest loss first, after epoch {epoch}: " + ", ".join(ranking))
    for method in grouped:
        if method.startswith("SAEF"):
            lines += comparisons(grouped, method, epochs, cut)
    return lines


def comparisons(grouped: Curves, method: str, epochs: Sequence[int], cut: int) -> list[str]:
    """How one SAEF method stands against EF and full precision, if they were run."""
    lines = []
    if "EF-SignSGDM-DC" in grouped:
        ahead = [
            epoch
            for epoch in epochs
            if mean_loss(grouped, method, epoch).value < mean_loss(grouped, "EF-SignSGDM-DC", epoch).value
        ]
        lines.append(f"{method} is ahead of EF after {len(ahead)} of {len(epochs)} epochs")
    if "SGDM" in grouped:
        early = [epoch for epoch in epochs if epoch <= cut]
        several = len(grouped[method][epochs[0]]) > 1
        margin = "to within two standard errors" if several else "by one seed, without standard errors"
        level = [epoch for epoch in early if gap(grouped, method, epoch) <= 2]
        lines.append(
            f"{method} is at full precision's loss or better, {margin}, after {len(level)} of {len(early)} "
            "epochs before the rate cut"
        )
        last = epochs[-1]
        ours, theirs = (mean_loss(grouped, name, last).value for name in (method, "SGDM"))
        lines.append(f"{method} ends at a loss of {ours:.4f}, full precision at {theirs:.4f}")
    return lines


def mean_loss(grouped: Curves, method: str, epoch: int) -> Mean:
    """A method's mean loss after an epoch."""
    return mean([row.training_loss for row in grouped[method][epoch]])


def gap(grouped: Curves, method: str, epoch: int) -> float:
    """How many standard errors of the difference a method's loss is above full precision's."""
    ours, theirs = mean_loss(grouped, method, epoch), mean_loss(grouped, "SGDM", epoch)
    difference = ours.value - theirs.value
    error = math.hypot(ours.error, theirs.error)
    return difference / error if error else math.copysign(math.inf, difference)


def plot(grouped: Curves, path: Path) -> None:
    """Draw loss against epochs and against bytes; the shade is one standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for method, groups in grouped.items():
        epochs = sorted(groups)
        losses = [mean_loss(grouped, method, epoch) for epoch in epochs]
        low, high = [v - e for v, e in losses], [v + e for v, e in losses]
        sent = [mean([row.bytes_sent for row in groups[epoch]]).value / 1e6 for epoch in epochs]
        for axes, across in ((left, [float(epoch) for epoch in epochs]), (right, sent)):
            (line,) = axes.plot(across, [v for v, _ in losses], marker="o", markersize=3, label=method)
            axes.fill_between(across, low, high, color=line.get_color(), alpha=0.2)
    left.set(xlabel="epoch", ylabel="training loss at x", yscale="log")
    right.set(xlabel="MB sent by a worker", xscale="log" if any(sent) else "linear")
    left.legend()
    figure.tight_layout()
    save(figure, path)
