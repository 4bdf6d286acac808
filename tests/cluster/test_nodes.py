"""worker="node" between hosts: which ranks share one is found, and a host sends what one rank would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hosts import why_not
from benchmarks.timings import read
from tests.mpi.launch import ENVIRONMENT, LIMIT, ROOT

pytest.importorskip("horovod.torch", reason="needs Horovod")


@pytest.mark.skipif(why_not() is not None, reason=f"cannot make hosts: {why_not()}")
def test_a_host_sends_what_one_rank_would(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.nodes", "--hosts", "2", "--model", "tiny", "--rounds", "3"]
    command += ["--seconds", "0.5", "--ways", "local", "one", "node", "rank", "node-overlap"]
    command += ["--out", str(tmp_path / "nodes.csv")]
    job = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT)
    assert job.returncode == 0, job.stdout[-5000:] + job.stderr[-5000:]
    timings = read(tmp_path / "nodes.csv")
    claimed = {timing.method: timing.claimed_bytes for timing in timings}
    assert claimed['worker="node"'] == claimed['worker="node", overlap'] == claimed["one rank a host"] > 0
    assert claimed['worker="rank"'] != claimed["one rank a host"]  # the check can fail
    counted = {timing.method: timing.interface_bytes for timing in timings if timing.round == 2}
    # Few bytes, so the frames around them weigh more than they would.
    assert counted['worker="node"'] < 1.5 * counted["one rank a host"]
    assert counted['worker="rank"'] > 1.5 * counted["one rank a host"]
