"""The findings that the checks of `hvd-saef doctor` return. Local."""

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
    """The result of one check, which is a line of the report."""

    check: str
    status: Status
    found: str
    fix: str = ""
    """What the user can do; empty if the status is "ok"."""


def ok(check: str, found: str) -> Finding:
    """Returns a finding that all is well."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, fix: str) -> Finding:
    """Returns a finding that training works, but not as well as it could."""
    return Finding(check, "warning", found, fix)


def failure(check: str, found: str, fix: str) -> Finding:
    """Returns a finding that training does not work like this."""
    return Finding(check, "failure", found, fix)


def output(*command: str, both: bool = False) -> str:
    """Returns what a command prints, with `both` on stderr too; "" if it cannot run or takes over 30 s."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + (done.stderr if both else "")


def some(ranks: Sequence[int]) -> str:
    """Returns in words the first eight of `ranks`, and how many more there are."""
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
