"""What follows from the measurements for a network: a MODEL, as no network was measured.

The wire is as fast as its bandwidth, without latency. DDP's ring either hides nothing behind backward, or all
that fits behind it: the truth lies between. Ours hides nothing, and its payloads go through host memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.pieces import Place, Row
from benchmarks.gpu.steps import DDP, NO_EXCHANGE, OURS
from hvd_saef import run_workers
from hvd_saef.planning.codec import measure_codec
from hvd_saef.planning.constants import Constants, of_gpus
from hvd_saef.planning.timing import Clock
from hvd_saef.transport.find import find_communicator

WORKERS = (8, 64)
GIGABITS = (1, 10, 25, 100, 400)


def host_seconds(rows: Sequence[Row]) -> float:
    """The seconds of a byte to the host and back, from the largest payload that was copied; NaN without."""
    copied = [row for row in rows if row.get("piece") == "copies"]
    largest = max(copied, key=lambda row: float(row["bytes"]), default={"seconds": math.nan, "bytes": 1})
    return float(largest["seconds"] / largest["bytes"])


def steps(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """The rows of one worker's steps, by model and method."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.get("workers") == 1 and "method" in row:
            found.setdefault(row["model"], {})[row["method"]] = row
    return {model: methods for model, methods in found.items() if {NO_EXCHANGE, DDP} <= set(methods)}


def predictions(rows: Sequence[Row]) -> list[Row]:
    """For each model, method of ours and number of workers: the break-even bandwidths, and steps."""
    return [
        prediction(methods, name, workers, host_seconds(rows))
        for methods in steps(rows).values()
        for name in OURS
        if name in methods
        for workers in WORKERS
    ]


def prediction(methods: dict[str, Row], name: str, workers: int, host: float) -> Row:
    """One row: times in ms, bandwidths in Gbit/s; infinite where ours is the faster one on any wire."""
    row, ddp = methods[name], methods[DDP]
    share = 2 * (workers - 1) / workers
    ring, payload = share * 4 * row["elements"], share * row["payload"]
    ours = row["ms"] / 1e3 + 2 * row["payload"] * (0.0 if math.isnan(host) else host)
    plain, backward = ddp["ms"] / 1e3, ddp["backward ms"] / 1e3

    def even(slower: float) -> float:
        return 8 * (ring - payload) / slower / 1e9 if slower > 0 else math.inf

    found: Row = {"model": row["model"], "method": name, "workers": workers}
    found |= {"break-even": even(ours - plain), "break-even, DDP hidden": even(ours - plain + backward)}
    for rate in GIGABITS:
        bits = 8 / (1e9 * rate)
        found[f"ours at {rate}"] = 1e3 * (ours + bits * payload)
        found[f"DDP at {rate}"] = 1e3 * (plain + bits * ring)
        found[f"DDP hidden at {rate}"] = 1e3 * (plain + max(0.0, bits * ring - backward))
    return found


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The predictions as a table."""
    found = predictions(rows)
    if not found:
        return
    rates = "".join(f"{f'{rate} Gbit/s':>26}" for rate in GIGABITS)
    yield "MODEL, not measured: ms a step of ours / of DDP / of DDP that hides all it can behind backward;"
    yield "ours is faster below the break-even bandwidth, in Gbit/s, without and with that hiding"
    yield f"{'model':<10}{'method':<18}{'K':>4}{'break-even':>12}{'hidden':>10}{rates}"
    for row in found:
        times = "".join(
            f"{row[f'ours at {n}']:>10.1f}/{row[f'DDP at {n}']:.1f}/{row[f'DDP hidden at {n}']:.1f}".rjust(26)
            for n in GIGABITS
        )
        limits = f"{row['break-even']:>12.1f}{row['break-even, DDP hidden']:>10.1f}"
        yield f"{row['model']:<10}{row['method']:<18}{row['workers']:>4}{limits}{times}"


def codec(place: Place) -> Iterator[Row]:
    """The constants of `hvd-saef plan` that belong to the device, measured as `hvd-saef calibrate` does."""

    def measure(rank: int) -> dict[str, float]:
        communicator, _ = find_communicator()
        return measure_codec(Clock(communicator, place.device, 0.02 if place.tiny else 1.0), lambda _: None)

    (found,) = run_workers(1, measure)
    yield {"name": "seconds an element", "constants": found}


def constants(rows: Sequence[Row]) -> Constants | None:
    """What `hvd-saef plan --constants` takes: what one GPU can tell, and estimates; None without a codec."""
    found = next((row["constants"] for row in rows if "constants" in row), None)
    if found is None:
        return None
    host, estimates = host_seconds(rows), of_gpus()
    measured = dict(found) | ({} if math.isnan(host) else {"byte": host})
    gpu = next((row["gpu"] for row in rows if "gpu" in row), "no GPU but the CPU")
    return dataclasses.replace(
        estimates,
        seconds={**estimates.seconds, **measured},
        source=f"make bench-gpu on one device, without a network; the rest is {estimates.source}",
        device=f"{gpu}, for each rank",
        estimated=[name for name in estimates.estimated if name not in measured],
    )


def save(rows: Sequence[Row], folder: Path) -> str:
    """Writes the constants; returns a line that says so, or why there are none."""
    found, path = constants(rows), folder / "plan-constants.json"
    if found is None:
        return "No constants for hvd-saef plan: they were not measured.\n"
    found.save(path)
    return f"Constants for hvd-saef plan --constants: {path}\n"


def summary(rows: Sequence[Row]) -> Any:
    """The predictions, without numbers that JSON does not have."""
    return [
        {name: None if value == math.inf else value for name, value in row.items()}
        for row in predictions(rows)
    ]
