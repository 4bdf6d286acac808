"""`hvd-saef doctor` over torch.distributed, in one real job and with stand-ins; no Horovod, no MPI."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import torch.distributed as dist

from hvd_saef import doctor
from hvd_saef.doctor import gloo, jobs, software, torch_job
from hvd_saef.doctor.jobs import MPI, TORCH, Alone, find_job
from hvd_saef.doctor.machine import STARTED, check_ranks
from hvd_saef.transport import hosts
from hvd_saef.transport.hosts import VARIABLE, address_of, address_of_name
from tests.torch_distributed.launch import run_ranks

TWO_HOSTS = """
import os, socket, sys
own = socket.gethostname()
socket.gethostname = lambda: own if os.environ["RANK"] == "0" else "elsewhere"
from hvd_saef import doctor
doctor.run(as_json=True)
assert not {"mpi4py.MPI", "horovod.torch"} & set(sys.modules)
"""
"""The last rank says that it is on another host."""


@pytest.fixture(autouse=True)
def not_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*torch_job.NAMES, *STARTED, VARIABLE, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port() -> int:
    """A port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
    return number


def rank_of(
    monkeypatch: pytest.MonkeyPatch, rank: int, size: int, port: int, address: str = "127.0.0.1"
) -> None:
    """This process becomes a rank, which soon gives up."""
    values = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": address, "MASTER_PORT": port}
    for name, value in (values | {"HVD_SAEF_STALL_ABORT_S": 0.5}).items():
        monkeypatch.setenv(name, str(value))


def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Horovod nor mpi4py is installed, as far as the doctor can see."""
    for module in (jobs, software):
        monkeypatch.setattr(module, "is_installed", lambda _: False)
    monkeypatch.setattr(jobs, "mpi4py", lambda: None)


def test_two_ranks() -> None:
    ended = run_ranks(2, ["-W", "ignore", "-c", TWO_HOSTS])
    assert [rank.code for rank in ended] == [0, 0], ended
    report: dict[str, Any] = json.loads(ended[0].said)
    assert ended[1].said == ""
    assert report["ranks"] == 2
    found = {finding["check"]: finding["found"] for finding in report["findings"]}
    assert "where rank 0 serves the store; all ranks have reached it" in found["MASTER_ADDR"]
    assert found["torch.distributed"].startswith("gloo")
    assert found["ranks"] == "2"
    assert found["versions"] == "the same on all 2 ranks"
    assert found["nodes"].startswith("2 of one rank")
    assert found["Horovod"].endswith("torch.distributed carries the updates")
    (link,) = report["links"]
    assert link["hosts"] == [socket.gethostname(), "elsewhere"]
    assert link["seconds"] > 0
    assert link["bits_per_second"] > 0


def test_torch_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_else(monkeypatch)
    job = find_job()
    assert job.carrier == TORCH
    report = doctor.examine(job)
    assert report is not None
    found = {finding.check: finding for finding, _ in report.findings}
    for name in ("Horovod", "mpi4py"):
        assert found[name].status == "ok"
        assert found[name].found == "not installed; torch.distributed carries the updates"
    assert found["torch.distributed"].status == found["ranks"].status == "ok"
    assert "MASTER_ADDR" not in found


def test_without_gloo_nothing_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_else(monkeypatch)
    monkeypatch.setattr(jobs, "has_gloo", lambda: False)
    job = find_job()
    assert job.carrier == MPI  # what else, so Horovod and mpi4py are failures, as ever
    monkeypatch.setattr(gloo, "has_gloo", lambda: False)
    assert gloo.check_backends(job).status == "failure"


def test_processes_that_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    found = check_ranks(Alone(TORCH))
    assert found.status == "failure"
    assert found.found == "4 processes were started, and torch.distributed sees 1: each would train alone"
    assert "torchrun" in found.fix


def test_half_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = check_ranks(find_job())
    assert found.status == "failure"
    assert found.found == "RANK=3, but MASTER_ADDR and MASTER_PORT not set: the ranks cannot meet"
    assert "launch/slurm/rank.sh" in found.fix


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        rank_of(monkeypatch, 0, 2, port)
        found = check_ranks(find_job())
    assert (found.check, found.status) == ("MASTER_PORT", "failure")
    assert found.found == f"MASTER_PORT={port} is in use on this host"


def test_an_address_that_nobody_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], port: int
) -> None:
    """The rank says so itself: rank 0 cannot know."""
    rank_of(monkeypatch, 1, 2, port, address="no-such-host.invalid")
    assert doctor.run() == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "hvd-saef doctor, rank 1 on " in said.err
    assert f"no connection to MASTER_ADDR=no-such-host.invalid MASTER_PORT={port}" in said.err
    assert "set MASTER_ADDR to the name or address of rank 0's host" in said.err


def test_ranks_that_do_not_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], port: int
) -> None:
    rank_of(monkeypatch, 0, 4, port)
    assert doctor.run() == 1
    said = capsys.readouterr().out
    assert "failure ranks: no answer from rank 1, 2, 3 of 4 within 0.5 s" in said
    assert said.endswith("verdict: failure\n")


def test_a_gloo_that_cannot_connect(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    rank_of(monkeypatch, 0, 1, port)
    monkeypatch.setenv(VARIABLE, "nowhere0")
    job = find_job()
    (trouble,) = job.allgather(job.connect())
    assert "nowhere0" in trouble
    assert not dist.is_initialized()
    ((found, ranks),) = gloo.judge_connections(["", trouble])
    assert (found.status, ranks) == ("failure", [1])
    assert trouble in found.found
    assert VARIABLE in found.fix


@pytest.mark.parametrize(
    ("chosen", "named", "hosts", "status", "found"),
    [
        ("", "10.0.0.1", 1, "ok", "eth0, ib0, docker0: gloo takes 10.0.0.1 on eth0, the address of the name"),
        ("", "10.0.0.1", 2, "warning", "though there is ib0"),
        ("ib0", "10.0.0.1", 2, "ok", "gloo takes 10.1.0.1 on ib0, as GLOO_SOCKET_IFNAME says"),
        ("ib0,eth0", "10.0.0.1", 2, "ok", "gloo takes 10.1.0.1 on ib0"),
        ("", "127.0.1.1", 2, "failure", "which no other host can reach"),
        ("", "127.0.1.1", 1, "ok", "gloo takes 127.0.1.1"),
        ("", "172.17.0.1", 2, "warning", "on docker0"),
        ("ib7", "10.0.0.1", 2, "failure", "GLOO_SOCKET_IFNAME=ib7: ib7 is not there"),
    ],
)
def test_the_interface_that_gloo_takes(
    chosen: str, named: str, hosts: int, status: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = {"eth0": "10.0.0.1", "ib0": "10.1.0.1", "docker0": "172.17.0.1", "lo": "127.0.0.1"}
    monkeypatch.setattr(gloo, "interfaces", lambda: ["eth0", "ib0", "docker0"])
    monkeypatch.setattr(gloo, "address_of", lambda name: addresses.get(name, ""))
    monkeypatch.setattr(gloo, "address_of_name", lambda: named)
    if chosen:
        monkeypatch.setenv(VARIABLE, chosen)
    job = Alone(TORCH)
    job.hosts = [[rank] for rank in range(hosts)]
    finding = gloo.check_interfaces(job)
    assert finding.status == status
    assert found in finding.found
    assert (VARIABLE in finding.fix) == (status != "ok")


def test_the_address_is_this_hosts() -> None:
    """The real ones, whatever they are: lo has an address, and the name's is one that can be bound."""
    assert address_of("lo") == "127.0.0.1"
    assert address_of("nowhere0") == ""
    assert address_of_name()


def test_hosts_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    everyone = []
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    for boot in ("a", "a", "b", "b"):
        monkeypatch.setattr(hosts, "BOOT", tmp_path / boot)
        (tmp_path / boot).write_text(f"{boot}\n")
        everyone.append(hosts.this_host())
    assert hosts.group_by_host(everyone) == [[0, 1], [2, 3]]
    monkeypatch.setattr(hosts, "BOOT", tmp_path / "not Linux")
    assert hosts.this_host() == ("localhost", "")
