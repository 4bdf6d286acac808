"""Measures the library on a GPU, within 8 minutes and without a network: `make bench-gpu`.

    python -m benchmarks.gpu                             # needs Python, torch and numpy alone
    python -m benchmarks.gpu --device cpu                # the same code on the CPU, tiny: whether it runs
    python -m benchmarks.gpu --resume                    # only what an earlier run did not reach

Writes bench-gpu.json and bench-gpu.txt into --out as it goes, and plan-constants.json for `hvd-saef plan`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.gpu import kernels, machine, steps, wire
from benchmarks.gpu.pieces import Command, Piece, Row

TITLES = {
    "kernels": "kernels: ms, GB/s of what one pass must move, and how many copies of as many bytes it takes",
    "peer": "DeepSpeed's chain of operations for the same job; its passes are those of sign above",
    "launches": "launches of a bucket and step",
    "copies": "payloads to page-locked host memory and back",
    "codec": "constants of the device for hvd-saef plan, as hvd-saef calibrate measures them",
    "alone": "a step of one worker: nothing is on the wire; added is what it takes beyond no exchange",
    "together": "a step of two processes that share the device, over gloo",
}


def line(row: Row) -> str:
    """A row in a line."""
    if row["piece"] == "machine":
        return machine.line(row)
    name = " ".join(str(row[key]) for key in ("layout", "model", "method", "name") if row.get(key))
    if "skipped" in row:
        return f"{name}: skipped, this machine lacks {row['skipped']}"
    row = {**row, **row.get("constants", {})}
    numbers = {key: row[key] for key in row if isinstance(row[key], (int, float)) and key != "elements"}
    return f"{name:<54}" + "".join(f"  {key} {value:.6g}" for key, value in numbers.items())


def table(rows: Sequence[Row]) -> str:
    """All rows by piece, and what follows from them."""
    parts = [[line(row) for row in rows if row["piece"] == "machine"]]
    parts += [
        [title, *(line(row) for row in rows if row["piece"] == piece)] for piece, title in TITLES.items()
    ]
    parts.append(list(wire.lines(rows)))
    return "\n\n".join("\n".join(part) for part in parts if len(part) > 1 or part is parts[0])


COMMAND = Command(
    module="benchmarks.gpu",
    about="Measures the library on a GPU.",
    pieces=[
        Piece("machine", 150.0, machine.look),
        Piece("kernels", 120.0, kernels.work),
        Piece("peer", 40.0, kernels.peer),
        Piece("launches", 40.0, kernels.counted),
        Piece("copies", 30.0, steps.copies),
        Piece("codec", 40.0, wire.codec),
        Piece("alone", 150.0, steps.alone),
        Piece("together", 120.0, steps.together),
    ],
    name="bench-gpu",
    table=table,
    line=line,
    summary=wire.summary,
    after=wire.save,
)


if __name__ == "__main__":
    sys.exit(COMMAND.main())
