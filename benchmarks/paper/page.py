"""Writes what runs show: results/small/summary.txt, and the tables of README.md. Without training.

    python -m benchmarks.paper.page

The words between the tables are written by hand, from the summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import fill, table
from benchmarks.paper.comparison import (
    EF,
    RESULTS,
    SAEF,
    SGDM,
    Runs,
    common_seeds,
    early,
    load_runs,
    mean,
    paired,
    report,
)
from benchmarks.paper.presets import BETA, EF_PERIODS, SAEF_PERIODS
from benchmarks.paper.rows import Row, training_loss

PAGE = Path(__file__).parent / "README.md"
TASK = "resnet8"


def seeds(runs: Runs, task: str, method: str) -> str:
    """How many runs there are."""
    return str(len(runs[task, method][1]))


def losses(runs: Runs) -> str:
    """Training loss before the cut and at the end."""
    epochs = [*early(TASK), max(runs[TASK, SGDM])]

    def row(method: str) -> list[str]:
        numbers = [mean([r.training_loss for r in runs[TASK, method][epoch]]) for epoch in epochs]
        return [method, *(f"{number:.3f}" for number in numbers), seeds(runs, TASK, method)]

    return table(["after epoch", *map(str, epochs), "seeds"], map(row, (SGDM, EF, SAEF, BETA[0])))


def periods(runs: Runs) -> str:
    """What averaging errors every p rounds changes; the mismatch over the seeds that all have."""
    compared = [(EF, method) for method in (EF, *reversed(EF_PERIODS))]
    compared += [(SAEF, method) for method in (SAEF, *reversed(SAEF_PERIODS))]
    common = common_seeds(runs, TASK, [method for _, method in compared])

    def row(without: str, method: str) -> list[str]:
        rows = runs[TASK, method]
        last = max(rows)
        before = [d for e in early(TASK) for d in paired(runs, TASK, without, method, e, training_loss)]
        end = paired(runs, TASK, without, method, last, training_loss)
        gains = ["", ""] if method == without else [f"{mean(before):+.3f}", f"{mean(end):+.3f}"]
        measured = [r for e in early(TASK) for r in rows[e] if r.seed in common]
        mismatch = mean([r.mismatch_exact for r in measured if r.mismatch_exact is not None])
        sent = rows[last][0].bytes_sent / 1e6 / last
        return [method, *gains, f"{mismatch:.2f}", f"{sent:.1f}", seeds(runs, TASK, method)]

    heads = ["", "loss before the cut", "at the end", "exact mismatch", "MB an epoch", "seeds"]
    return table(heads, (row(*pair) for pair in compared))


SIGN = "SAEF-SignAdamW-DC"
DECODER = {
    "full precision": "AdamW",
    "full precision, rate × 0.5": "AdamW rate=0.5",
    "full precision, rate × 2": "AdamW rate=2",
    "local AdamW, updates averaged uncompressed": "Local-AdamW",
    "the same, rate × 2": "Local-AdamW rate=2",
    "SAEF, sign, DC, β = 1": f"{SIGN} beta=1",
    "SAEF, sign, DC, β = 1, rate × 0.5": f"{SIGN} beta=1 rate=0.5",
    "SAEF, sign, DC, β = 1, rate × 2": f"{SIGN} beta=1 rate=2",
    "SAEF, sign, DC, β = 1, rate × 4": f"{SIGN} beta=1 rate=4",
    "SAEF, sign, DC": SIGN,
    "EF, sign, DC": "EF-SignAdamW-DC",
    "SAEF, Top-K 1 %, DC": "SAEF-AdamW-DC-TopK1%",
    "EF, Top-K 1 %, DC": "EF-AdamW-DC-TopK1%",
    "EF on *gradients*, sign, SC, then AdamW": "GradientEF-SignAdamW-SC",
    "the same, rate × 0.25": "GradientEF-SignAdamW-SC rate=0.25",
    "local AdamW uncompressed, H = 4": "Local-AdamW H=4",
    "SAEF, sign, DC, β = 1, H = 4": f"{SIGN} beta=1 H=4",
    "local AdamW uncompressed, H = 16": "Local-AdamW H=16",
    "SAEF, sign, DC, β = 1, H = 16": f"{SIGN} beta=1 H=16",
}
"""What the page calls the methods."""


def decoder(runs: Runs) -> str:
    """Validation loss of the transformer, and what was sent for it."""

    def loss(rows: Sequence[Row]) -> str:
        return f"{mean([row.test_loss for row in rows]):.3f}"

    def row(name: str, method: str) -> list[str]:
        epochs = runs["decoder", method]
        sent = f"{epochs[1][0].bytes_sent / 1e6:.0f}" if "Gradient" not in method else "not counted"
        return [name, *(loss(epochs[e]) for e in sorted(epochs)), sent, seeds(runs, "decoder", method)]

    epochs = [str(epoch) for epoch in sorted(runs["decoder", "AdamW"])]
    return table(["after epoch", *epochs, "MB", "seeds"], (row(*item) for item in DECODER.items()))


def main() -> None:
    """Write the page's tables, and the summary."""
    runs = load_runs(RESULTS)
    lines = report(runs, load_runs(RESULTS, unfinished=True))
    (RESULTS / "summary.txt").write_text("".join(f"{line}\n" for line in lines))
    for make in (losses, periods, decoder):
        fill(PAGE, make.__name__, make(runs))


if __name__ == "__main__":
    main()
