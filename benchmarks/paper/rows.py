"""The CSV of a run: a row an epoch."""

from __future__ import annotations

import csv
import math
import os
import types
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Row:
    """A run after an epoch; None where there is no such number. No times: a rerun gives the same row."""

    task: str
    method: str
    seed: int
    epoch: int
    training_loss: float = math.nan
    """At x, as the two numbers below."""
    test_loss: float = math.nan
    test_accuracy: float = math.nan
    auxiliary_training_loss: float | None = None
    """At x̃, as the two numbers below."""
    auxiliary_test_loss: float | None = None
    auxiliary_test_accuracy: float | None = None
    bytes_sent: float = math.nan
    """By a worker since the start, the mean over workers."""
    float32_bytes: float = math.nan
    """What a float32 ring allreduce would have sent by now."""
    mismatch_exact: float | None = None
    """This and what follows: the means over the epoch of `hvd_saef.diagnostics.Measurement`."""
    mismatch_bound_ef: float | None = None
    mismatch_bound_saef: float | None = None
    server_error: float | None = None
    error: float | None = None
    mean_error: float | None = None
    error_variance: float | None = None
    update: float | None = None
    delta: float | None = None


def write(file: Path, rows: list[Row]) -> None:
    """The CSV of `rows`, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    with open(temporary, "w", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    os.replace(temporary, file)


def read(file: Path) -> list[Row]:
    """What :func:`write` wrote; [] if there is no file."""
    if not file.exists():
        return []
    kinds = get_type_hints(Row)

    def value(name: str, text: str) -> Any:
        kind = kinds[name]
        if isinstance(kind, types.UnionType):
            kind = next(k for k in get_args(kind) if k is not types.NoneType)
            return kind(text) if text else None
        return kind(text)

    with open(file, newline="") as stream:
        return [
            Row(**{name: value(name, text) for name, text in line.items()}) for line in csv.DictReader(stream)
        ]


def training_loss(row: Row) -> float | None:
    """At x."""
    return row.training_loss


def accuracy(row: Row) -> float | None:
    """At x, in percent."""
    return 100 * row.test_accuracy


def test_loss(row: Row) -> float | None:
    """At x."""
    return row.test_loss
