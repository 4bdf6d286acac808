"""Hosts on one machine: there while needed, apart from each other, as slow as asked, and gone after."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from benchmarks import hosts as module
from benchmarks import sessions
from benchmarks.hosts import PREFIX, Hosts, HostsError, bits_per_second, clean, why_not
from tests.mpi.launch import ENVIRONMENT, LIMIT, ROOT

needs_hosts = pytest.mark.skipif(why_not() is not None, reason=f"cannot make hosts: {why_not()}")


def names() -> set[str]:
    """All network namespaces of this machine."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split(" ")[0] for line in listed.splitlines()}


def said(hosts: Hosts, host: str, command: str, tmp_path: Path) -> str:
    """What a shell command prints on a host."""
    path = tmp_path / "said"
    with open(path, "w") as output:
        assert hosts.run(["sh", "-c", command], LIMIT, host, output) == 0, path.read_text()
    return path.read_text().strip()


def seconds_to_send(hosts: Hosts, size: int, tmp_path: Path) -> float:
    """How long `size` bytes take from the second host to the first, by TCP."""
    receiver = f"""
import socket, time
with socket.create_server(("{hosts.addresses[0]}", 4000)) as server:
    open("{tmp_path}/listening", "w").close()
    connection, _ = server.accept()
    start, left = time.perf_counter(), {size}
    while left:
        left -= len(connection.recv(1 << 20))
    print(time.perf_counter() - start)
"""
    sender = f'import socket; socket.create_connection(("{hosts.addresses[0]}", 4000)).sendall(bytes({size}))'
    (tmp_path / "listening").unlink(missing_ok=True)
    inside = ["ip", "netns", "exec", hosts.namespace("h0"), sys.executable, "-c", receiver]
    with subprocess.Popen(inside, stdout=subprocess.PIPE, text=True) as receiving:
        while not (tmp_path / "listening").exists():
            assert receiving.poll() is None
            time.sleep(0.01)
        assert hosts.run([sys.executable, "-c", sender], LIMIT, "h1") == 0
        return float(receiving.communicate(timeout=LIMIT)[0])


@needs_hosts
def test_hosts_are_apart_and_go_away(tmp_path: Path) -> None:
    before = names()
    with Hosts(2, "1gbit") as hosts:
        own = {hosts.namespace(host) for host in ("h0", "h1", "switch")}
        assert own <= names()
        for number, host in enumerate(hosts.names):
            assert said(hosts, host, "hostname", tmp_path) == host
            assert said(hosts, host, "echo $TMPDIR", tmp_path) == str(hosts.folder / host)
            assert f"10.77.0.{number + 1}/24" in said(hosts, host, "ip -4 address show eth0", tmp_path)
        sleeper = subprocess.Popen(["ip", "netns", "exec", hosts.namespace("h1"), "sleep", "600"])
        folder = hosts.folder
    assert sleeper.wait(LIMIT) != 0  # ended with its host
    assert not own & names()
    assert names() >= before & names()
    assert not folder.exists()


@needs_hosts
def test_the_rate_holds(tmp_path: Path) -> None:
    size = 3_000_000  # beyond the bucket of 256 KiB, 0.22 s at 100 Mbit/s
    with Hosts(2, "100mbit") as hosts:
        slow = seconds_to_send(hosts, size, tmp_path)
    assert slow > (size - 2 * 256 * 1024 - 500_000) * 8 / 1e8
    with Hosts(2) as hosts:  # the check can fail
        assert any(seconds_to_send(hosts, size, tmp_path) < slow for _ in range(100))


@needs_hosts
def test_hosts_share_the_cores_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine's setting is off while the first hosts are there, and then as it was, also after a kill."""
    setting, other = tmp_path / "sched_autogroup_enabled", tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(sessions, "SETTING", setting)
    for before in ("1", "0"):
        setting.write_text(before)
        with Hosts(1):
            assert setting.read_text() == "0"
            sessions.share_no_cores(other)  # another owner's, who leaves first
            sessions.share_cores_again(other)
            assert setting.read_text() == "0"
        assert setting.read_text() == before
    left = Path(tempfile.mkdtemp(prefix=f"{PREFIX}999999999-"))
    setting.write_text("1")
    sessions.share_no_cores(left)
    assert setting.read_text() == "0"
    clean()
    assert setting.read_text() == "1"
    assert not left.exists()
    setting.unlink()  # no such kernel
    with Hosts(1):
        assert not setting.exists()


@needs_hosts
def test_a_failure_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"{PREFIX}{os.getpid()}-"
    with pytest.raises(ZeroDivisionError), Hosts(1):
        _ = 1 / 0
    assert not any(name.startswith(own) for name in names())
    monkeypatch.setattr(module, "INTERFACE", "much-too-long-a-name")
    with pytest.raises(HostsError, match="much-too-long-a-name"):
        Hosts(1).__enter__()
    assert not any(name.startswith(own) for name in names())


@needs_hosts
def test_what_a_killed_run_left_is_cleaned() -> None:
    code = "import sys, time; from benchmarks.hosts import Hosts; Hosts(1).__enter__(); print(1, flush=True)"
    command = [sys.executable, "-c", code + "; time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=ENVIRONMENT) as killed:
        assert killed.stdout is not None
        killed.stdout.readline()
        left = f"{PREFIX}{killed.pid}-h0"
        clean()
        assert left in names()  # its owner lives
        assert len(list(Path(tempfile.gettempdir()).glob(f"{PREFIX}{killed.pid}-*"))) == 1
        killed.send_signal(signal.SIGKILL)
    clean()
    assert left not in names()
    assert not list(Path(tempfile.gettempdir()).glob(f"{PREFIX}{killed.pid}-*"))


@needs_hosts
def test_mpirun_is_found_without_an_activated_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside this Python, as everything else that `make setup` installs; and nowhere is said so."""
    beside = os.path.dirname(sys.executable)
    monkeypatch.setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    with Hosts(1) as hosts:
        monkeypatch.setitem(module.ENVIRONMENT, "PATH", f"{beside}:{os.environ['PATH']}")
        assert hosts.run(hosts.mpirun(["true"]), LIMIT) == 0
        monkeypatch.setitem(module.ENVIRONMENT, "PATH", "")
        with pytest.raises(HostsError, match="no mpirun"):
            hosts.mpirun(["true"])


def test_rates() -> None:
    assert bits_per_second("100mbit") == 1e8
    assert bits_per_second("2.5gbit") == 2.5e9
    assert bits_per_second("unlimited") == math.inf
    with pytest.raises(ValueError, match="'fast'"):
        bits_per_second("fast")


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in (why_not() or "")
    with pytest.raises(HostsError, match="root"):
        Hosts(2).__enter__()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "")
    assert "iproute2" in (why_not() or "")
