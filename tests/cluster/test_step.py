"""benchmarks/cluster.py runs benchmarks/step.py between hosts, and counts what goes over their link."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from benchmarks.hosts import why_not
from benchmarks.timings import read
from tests.mpi.launch import ROOT
from tests.mpi.test_step import SHORT, run

pytest.importorskip("horovod.torch", reason="needs Horovod")
pytest.importorskip("matplotlib", reason="needs the extra [examples]")


@pytest.mark.skipif(why_not() is not None, reason=f"cannot make hosts: {why_not()}")
def test_between_hosts(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "cluster.py"), *SHORT, "2"]
    script += ["--rates", "1gbit", "memory", "--hosts", "2", "--out", str(tmp_path)]
    script += ["--methods", "local", "sign-dc", "hvd", "ddp"]
    run(script, tmp_path)
    timings = read(tmp_path / "tiny-1gbit-2.csv")
    ring = [timing for timing in timings if timing.method == "DDP"]
    # Few bytes, so the frames around them weigh more than they would; but they are of that order.
    assert all(0.9 < timing.interface_bytes / timing.theory_bytes < 3 for timing in ring)
    assert all(math.isnan(t.interface_bytes) for t in read(tmp_path / "tiny-memory-2.csv"))
    before = (tmp_path / "tiny-1gbit-2.csv").stat().st_mtime_ns
    assert "1gbit x2" in run(script, tmp_path)  # resumed: nothing is run again
    assert (tmp_path / "tiny-1gbit-2.csv").stat().st_mtime_ns == before
