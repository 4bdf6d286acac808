"""How tests start torch.distributed jobs: the ranks themselves, as srun would, so that each one is heard."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import without
from tests.mpi.launch import LIMIT, ROOT, run_job


@dataclass
class Ended:
    """What became of a rank, and what it said."""

    code: int
    said: str


def run_ranks(
    size: int, arguments: Sequence[str], lost: int | None = None, **environment: str
) -> list[Ended]:
    """Runs `python ARGUMENTS` as each rank of a job; returns what became of them, in rank order.

    The rank `lost` is not waited for: it is killed once all others have ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(size):
            said = stack.enter_context(open(Path(folder, str(rank)), "w"))
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            everything = os.environ | common | own
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=ROOT,
                    env=everything,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                )
            )
        deadline = time.monotonic() + without.patience(LIMIT)
        try:
            for rank, process in enumerate(ranks):
                if rank != lost:
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return [
            Ended(process.returncode, Path(folder, str(k)).read_text()) for k, process in enumerate(ranks)
        ]


def torchrun(size: int, arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` by torchrun, with so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    return run_job([*command, *arguments], environment={"OMP_NUM_THREADS": "1"} | environment)
