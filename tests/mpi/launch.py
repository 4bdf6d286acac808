"""How tests start MPI jobs on one machine: more ranks than cores, as root or not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import hosts
from tests import without

ROOT = Path(__file__).resolve().parents[2]

ENVIRONMENT = os.environ | hosts.ENVIRONMENT


def run_job(
    command: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `command` in the checkout to its end, and return what it said.

    Raises subprocess.TimeoutExpired; then, all that it started is ended: stopped ranks outlive a launcher.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as job:
        try:
            out, errors = job.communicate(timeout=without.patience(timeout))
        except BaseException:
            end_session(job.pid)
            raise
    return subprocess.CompletedProcess(command, job.returncode, out, errors)


def end_session(session: int) -> None:
    """Kill all processes of a session."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(after_name[3]) == session:
                os.kill(int(folder.name), signal.SIGKILL)
