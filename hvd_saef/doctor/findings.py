"""What a check of `hvd-saef doctor` returns."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failure"]
BOOTSTRAP = "run launch/bootstrap.sh with the modules loaded that jobs load"
REBUILD = (
    "remove the environment (.venv) and Horovod's wheel (~/.cache/hvd_saef/horovod-*), then " + BOOTSTRAP
)


@dataclass(frozen=True)
class Finding:
    """A line of the report."""

    check: str
    status: Status
    found: str
    fix: str = ""
    """What to do, unless all is well."""


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, fix: str) -> Finding:
    """It works, but not as it could."""
    return Finding(check, "warning", found, fix)


def failure(check: str, found: str, fix: str) -> Finding:
    """Training does not work like this."""
    return Finding(check, "failure", found, fix)


def output(*command: str, both: bool = False) -> str:
    """What a command prints; nothing if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + (done.stderr if both else "")


def some(ranks: Sequence[int]) -> str:
    """The first of them, and how many more."""
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
