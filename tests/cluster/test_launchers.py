"""mpirun.sh and horovodrun.sh of launch/, with a list of hosts that a stand-in for ssh reaches."""

from __future__ import annotations

import csv
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hosts import Hosts, why_not
from tests.mpi.launch import ENVIRONMENT, LIMIT, ROOT

pytest.importorskip("horovod.torch", reason="needs Horovod")
pytest.importorskip("mlxtend", reason="needs the extra [examples]")

LAUNCHERS = ["mpirun.sh", "horovodrun.sh"]
STEPS = 60


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two, for all tests of this file."""
    reason = why_not()
    if reason:
        pytest.skip(f"cannot make hosts: {reason}")
    with Hosts(2) as made:
        yield made


def run(hosts: Hosts, launcher: str, log: Path, *command: str) -> int:
    """Under a launcher with two ranks a host; its exit code."""
    settings = {"HOSTS": "h0:2,h1:2", "INTERFACE": "eth0", "PYTHONPATH": str(ROOT)}
    settings["PATH"] = f"{hosts.agent.parent}:{ENVIRONMENT['PATH']}"
    with open(log, "a") as output:
        return hosts.run(
            [str(ROOT / "launch" / launcher), sys.executable, "-m", "mpi4py", *command],
            LIMIT,
            output=output,
            environment=settings,
        )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_quick_start(hosts: Hosts, launcher: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = ["-m", "tests.cluster.quickstart", "--methods", "SAEF-SignSGDM-DC"]
    code = run(hosts, launcher, log, *command, "--epochs", "2", "--cut", "2", "--output", str(tmp_path))
    assert code == 0, log.read_text()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert len(rows) == 2
    assert 0 < float(rows[1]["training_loss"]) < 1.5
    assert float(rows[1]["bytes_sent"]) > 0


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_fails_ends_the_job(hosts: Hosts, launcher: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run(hosts, launcher, log, "-m", "tests.cluster.crash", "raise") != 0
    assert "OSError: this rank's disk is gone" in log.read_text()


def ranks_on(hosts: Hosts, host: str) -> list[int]:
    """The processes on a host that run examples/preemptible.py."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            there = (process / "ns" / "net").stat().st_ino
        except OSError:
            continue
        namespace = Path("/run/netns", hosts.namespace(host)).stat().st_ino
        if there == namespace and words[1:3] == [b"-m", b"mpi4py"] and b"python" in words[0]:
            found.append(int(process.name))
    return found


def test_signals_to_one_rank_and_the_same_bits(hosts: Hosts, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = [str(ROOT / "examples" / "preemptible.py"), "--steps", str(STEPS)]
    slow = tmp_path / "slow"
    slow.touch()  # a minute for a signal to come in time
    ended = threading.Event()

    def signal_once_it_trains(times: int, number: signal.Signals) -> None:
        while log.read_text().count("trains from step") < times and not ended.is_set():
            time.sleep(0.05)
        if not ended.is_set():
            os.kill(ranks_on(hosts, "h1")[-1], number)

    for restart, number in enumerate([signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1]):
        log.touch()
        ended.clear()
        thread = threading.Thread(target=signal_once_it_trains, args=(restart + 1, number))
        thread.start()
        arguments = ["--checkpoint", str(tmp_path / "stopped"), "--slow-while", str(slow)]
        try:
            code = run(hosts, "mpirun.sh", log, *script, *arguments)
        finally:
            ended.set()
            thread.join()
        assert code == 75, log.read_text()
    assert run(hosts, "mpirun.sh", log, *script, "--checkpoint", str(tmp_path / "stopped")) == 0
    said = log.read_text()
    starts = [int(step) for step in re.findall(r"trains from step (\d+) on", said)]
    assert starts == [0, *map(int, re.findall(r"stopped and saved after step (\d+)", said))]
    assert 0 < starts[1] < starts[2] < starts[3] < STEPS
    assert run(hosts, "mpirun.sh", log, *script, "--checkpoint", str(tmp_path / "whole")) == 0
    first, second = re.findall(r"x has the hash (\w{64})", log.read_text())
    assert first == second
