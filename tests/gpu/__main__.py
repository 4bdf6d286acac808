"""Tests the library on a GPU, within 8 minutes and without a network: `make test-gpu`.

    python -m tests.gpu                                  # needs Python, torch and numpy alone
    python -m tests.gpu --device cpu --only workers      # the same code on the CPU, tiny
    python -m tests.gpu --resume                         # only what an earlier run did not reach

Writes test-gpu.json and test-gpu.txt into --out as it goes. What the machine lacks is skipped by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.gpu import machine
from benchmarks.gpu.pieces import Command, Piece, Place, Row
from tests.gpu import kernel_checks, process_checks, worker_checks
from tests.gpu.registry import CHECKS, run

MODULES = (kernel_checks, worker_checks, process_checks)
"""Importing them has registered their checks."""
LIMITS = {
    "kernels": 150.0,
    "workers": 120.0,
    "streams": 60.0,
    "amp": 40.0,
    "memory": 60.0,
    "checkpoints": 60.0,
    "processes": 150.0,
    "sanitizer": 150.0,
}
"""Seconds, in the order in which the pieces run."""


def work(piece: str, place: Place) -> Iterator[Row]:
    """Runs a piece's checks."""
    return run(CHECKS[piece], place)


def line(row: Row) -> str:
    """A check in a line, and in more lines what went wrong."""
    if "check" not in row:
        return machine.line(row)
    text = f"{row['outcome']:<8}{row['seconds']:>7.1f} s  {row['piece']}: {row['check']}"
    return f"{text}\n{row['detail']}".rstrip().replace("\n", "\n    ")


def table(rows: Sequence[Row]) -> str:
    """All checks, and how many there are of each outcome."""
    outcomes = [row["outcome"] for row in rows if "check" in row]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "skipped"))
    return "\n".join([*map(line, rows), counts])


COMMAND = Command(
    module="tests.gpu",
    about="Tests the library on a GPU.",
    pieces=[
        Piece("machine", 150.0, machine.look),
        *(Piece(name, seconds, partial(work, name)) for name, seconds in LIMITS.items()),
    ],
    name="test-gpu",
    at_once=3,
    table=table,
    line=line,
    failed=lambda row: row.get("outcome") == "failed",
)

if __name__ == "__main__":
    sys.exit(COMMAND.main())
