"""The checks for a GPU by the piece that they belong to, and how a piece runs its own. Needs no pytest."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.pieces import Place, Row
from hvd_saef import kernels
from tests.kernels.versions import without_interpreter

Check = Callable[[Place], None]
CHECKS: dict[str, dict[str, Check]] = {}
LINES = 12
"""How much of a traceback is kept."""


class Lacking(Exception):  # noqa: N818
    """What the machine lacks for a check, which is skipped by this name."""


def check(piece: str, name: str = "") -> Callable[[Check], Check]:
    """Registers a check of a piece, by its own name or another."""

    def register(function: Check) -> Check:
        CHECKS.setdefault(piece, {})[name or function.__name__] = function
        return function

    return register


def without_triton(place: Place) -> str:
    """Why Triton's kernels do not work on the device, or nothing."""
    version = kernels.load("on_triton")
    if isinstance(version, str):
        return version
    if not version.takes(place.device, torch.float32):
        return "its interpreter is off, or on"
    return "" if place.on_gpu else without_interpreter()


def best(place: Place) -> str:
    """What to ask of HVD_SAEF_KERNELS on the device: Triton where it works, else what is there."""
    return "" if without_triton(place) else "triton"


def needs_triton(place: Place) -> None:
    """Skips where Triton's kernels do not work on the device."""
    if why := without_triton(place):
        raise Lacking(f"Triton: {why}")


def needs_memory(place: Place, gigabytes: float) -> None:
    """Skips where the device has less free memory."""
    if not place.tiny and torch.cuda.mem_get_info(place.device)[0] < 1e9 * gigabytes:
        raise Lacking(f"{gigabytes:g} GB of free memory")


def run(checks: dict[str, Check], place: Place) -> Iterator[Row]:
    """Runs checks, one row each, until the device is lost."""
    for name, function in checks.items():
        start, outcome, detail = time.monotonic(), "passed", ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(place)
                place.wait()
        except Lacking as lacking:
            outcome, detail = "skipped", f"this machine lacks: {lacking}"
        except Exception:
            outcome, detail = "failed", "\n".join(traceback.format_exc().splitlines()[-LINES:])
        seconds = round(time.monotonic() - start, 2)
        yield {"check": name, "outcome": outcome, "detail": detail, "seconds": seconds}
        try:
            place.wait()
        except RuntimeError as error:  # after an illegal access nothing works any more
            yield {"check": "the device", "outcome": "failed", "detail": f"lost: {error}", "seconds": 0.0}
            return
