"""`hvd-saef doctor` on several hosts: it finds the slow one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hosts import INTERFACE, Hosts, why_not
from tests.mpi.launch import LIMIT, ROOT

pytest.importorskip("horovod.torch", reason="needs Horovod")


@pytest.mark.skipif(why_not() is not None, reason=f"cannot make hosts: {why_not()}")
def test_the_slowest_link(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "hvd_saef.cli", "doctor", "--json"]
    with Hosts(4, "400mbit") as hosts:  # slow, so that links are what takes time
        slow = ["qdisc", "replace", "dev", INTERFACE, "root", "tbf"]
        slow += ["rate", "60mbit", "burst", "256kb", "latency", "50ms"]
        subprocess.run(["tc", "-n", hosts.namespace("h2"), *slow], check=True)
        with open(tmp_path / "log", "w") as log:
            environment = {"PYTHONPATH": str(ROOT)}
            code = hosts.run(hosts.mpirun(command), LIMIT, output=log, environment=environment)
    report = json.loads((tmp_path / "log").read_text())
    assert code == 0, report
    rates = {tuple(sorted(link["hosts"])): link["bits_per_second"] for link in report["links"]}
    assert set(rates) == {(f"h{a}", f"h{b}") for a in range(4) for b in range(a + 1, 4)}
    # A burst goes through faster than the rate: slow links measure up to twice their 60 Mbit/s.
    assert all((rate < 2e8) is ("h2" in pair) for pair, rate in rates.items()), rates
    assert all(link["seconds"] > 0 for link in report["links"])
    (links,) = [finding for finding in report["findings"] if finding["check"] == "links"]
    slowest = min(rates, key=lambda pair: rates[pair])
    assert "–".join(slowest) in links["found"]
    (versions,) = [finding for finding in report["findings"] if finding["check"] == "versions"]
    assert versions["found"] == "the same on all 4 ranks"
