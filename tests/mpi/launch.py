"""How tests start MPI jobs on one machine: more ranks than cores, as root or not."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import hosts
from tests import without

ROOT = Path(__file__).resolve().parents[2]
MPIRUN, HOROVODRUN = hosts.MPIRUN, str(ROOT / "launch" / "horovodrun.sh")
"""They know the options of the MPI at hand; no test asks mpirun itself."""

ENVIRONMENT = os.environ | hosts.ENVIRONMENT
LIMIT = without.LIMIT
MARK = "HVD_SAEF_TEST_JOB"
"""Names the job to whatever it starts. Not a session of its own, with which Linux would share out the cores
between it and the tests beside it, whether its ranks work or wait: see benchmarks/sessions.py."""


def run_job(
    command: Sequence[str],
    timeout: float = LIMIT,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Run `command` in a folder (the checkout) to its end, and return what it said.

    Raises subprocess.TimeoutExpired; then, all that it started is ended: stopped ranks outlive a launcher.
    """
    mark = secrets.token_hex(8)
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=ENVIRONMENT | dict(environment or {}) | {MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        try:
            out, errors = job.communicate(timeout=without.patience(timeout))
        except BaseException:
            end_marked(mark)
            raise
    return subprocess.CompletedProcess(command, job.returncode, out, errors)


def end_marked(mark: str) -> None:
    """Kill all processes that a job has started, by what stands in their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def end_session(session: int) -> None:
    """Kill all processes of a session."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(after_name[3]) == session:
                os.kill(int(folder.name), signal.SIGKILL)
