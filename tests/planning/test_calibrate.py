"""`hvd-saef calibrate` on threads, and in one real job of each kind; never how fast anything is."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import hvd_saef
from hvd_saef.cli import main
from hvd_saef.errors import WorkerError
from hvd_saef.planning import calibrate, network, plan, steps
from hvd_saef.planning.constants import FEATURES, Constants
from hvd_saef.planning.timing import Clock, Progress
from hvd_saef.settings import Settings
from hvd_saef.transport.communicator import Channel
from hvd_saef.transport.find import find_communicator
from tests.mpi.launch import MPIRUN, run_job
from tests.torch_distributed.launch import run_ranks

CPU = torch.device("cpu")
ASK = ["plan", "--parameters", "25.6M", "--workers", "8", "--compute", "0.1", "--constants"]


def silent(stage: str) -> None:
    """What is told of progress."""


def measured(workers: int, ranks: int = 1) -> list[Constants]:
    """What each of some threads found, which stand for so many ranks on each of some hosts."""

    def work(rank: int) -> Constants:
        communicator = find_communicator()[0]

        def begin(stage: str) -> None:
            assert communicator.doing[Channel.WORDS] == f"calibrating {stage}"  # in messages on lost ranks

        return calibrate.calibrate(communicator, CPU, 0.0, begin, "threads")

    return hvd_saef.run_workers(workers, work, ranks=ranks)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little memory and short messages: what is measured means nothing, but all of it is measured."""
    monkeypatch.setattr(Settings, "bucket_bytes", 4 * 2 * plan.TENSOR)
    monkeypatch.setattr(network, "MOST", network.LEAST)
    monkeypatch.setattr(steps, "LARGE", {"cpu": (64, 4)})


@pytest.mark.usefixtures("quick")
def test_all_ranks_find_the_same_constants_of_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measured(2, ranks=2)
    known = found[0]
    assert all(one == known for one in found)
    assert set(known.seconds) == set(FEATURES)
    for names in (("message", "collective"), ("latency",), ("land",), ("sign_encode",), ("topk_encode",)):
        assert sum(known.seconds[name] for name in names) > 0
    assert known.seconds["wire"] == 1
    assert known.bandwidth is not None
    assert known.inside is not None
    assert min(known.bandwidth, known.inside) > 0
    assert known.made["ranks"] == 4
    assert [host["ranks"] for host in known.made["hosts"]] == [2, 2]
    assert known.made["versions"]["torch"] == torch.__version__
    assert known.made["date"][:10] in known.source
    assert set(known.made["check"]) == {"parameters", "compute", "measured", "model"}

    path = tmp_path / "mine.json"
    known.save(path)
    assert Constants.load(path) == known
    main([*ASK, str(path), "--ranks-per-node", "2"])  # the file has the bandwidths
    text = capsys.readouterr().out
    assert f"Where from: {known.source}." in text
    assert f"nodes send {known.bandwidth / 1e9:g} Gbit/s (each rank {known.inside / 1e9:g} inside)" in text
    assert "--device" not in text
    main([*ASK, str(path), "--bandwidth", "5Gbit"])
    assert "8 workers that send 5 Gbit/s" in capsys.readouterr().out

    report = calibrate.report(known)
    assert report.startswith("Measured on 4 ranks, 2 hosts: ")
    assert all(f"\n  {name} " in report for name in FEATURES)
    assert "Check: a step of 0.0 M parameters took " in report
    off = dict(known.made, check={"parameters": 1, "compute": 1.0, "measured": 1.0, "model": 1.2})
    assert "far off" not in calibrate.report(dataclasses.replace(known, made=off))
    off["check"]["model"] = 1.4
    assert "far off" in calibrate.report(dataclasses.replace(known, made=off))


@pytest.mark.usefixtures("quick")
def test_what_two_ranks_on_one_host_cannot_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = measured(1, ranks=2)[0]
    assert set(known.estimated) == {"message", "latency"}
    assert known.bandwidth is None
    assert known.inside is not None
    known.save(tmp_path / "mine.json")
    with pytest.raises(SystemExit):
        main([*ASK, str(tmp_path / "mine.json")])
    assert "--bandwidth is needed" in capsys.readouterr().err
    main([*ASK, str(tmp_path / "mine.json"), "--bandwidth", "10Gbit"])
    assert "ESTIMATED, not measured: message, latency." in capsys.readouterr().out


class Times:
    """A clock that reads times from a table: what measurements become, without measuring."""

    def __init__(self, size: int, seconds: Callable[[str, int, int], float]) -> None:
        self.communicator, self.device, self.seconds = Fake(size), CPU, 1.0
        self._table = seconds

    def time(self, call: Callable[[], object], calls: int = 1) -> float:
        """Calls, and returns what the table has for the last collective."""
        call()
        return self._table(*Fake.last)

    once = time


class Fake:
    """A communicator that notes which collective was called with how many bytes."""

    last: tuple[str, int, int] = ("", 0, 0)

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, 0

    def part(self, ranks: Sequence[int]) -> Fake:
        """Fewer ranks."""
        return Fake(len(ranks))

    def alltoall(self, pieces: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
        """Notes it."""
        Fake.last = "alltoall", self.size, pieces[0].numel()

    def combine(self, word: int) -> int:
        """Notes it."""
        Fake.last = "combine", self.size, 8
        return word

    def allreduce_mean(self, tensor: torch.Tensor, name: str) -> None:
        """Notes it."""
        Fake.last = "mean", self.size, tensor.nbytes


@pytest.mark.parametrize(("hosts", "a_node"), [(4, 1), (2, 2), (8, 1), (4, 4)])
def test_times_of_a_known_network_give_its_constants(hosts: int, a_node: int) -> None:
    """A network on which each message, level, ring's step and byte takes its time."""
    size = hosts * a_node
    message, collective, latency, mean, bits, element = 2e-5, 3e-4, 4e-5, 5e-4, 1e9, 1e-9

    def seconds(what: str, ranks: int, count: int) -> float:
        if what == "combine":
            return 1e-4 + latency * (ranks - 1).bit_length()
        if what == "mean":
            sent = 2 * (ranks - 1) / ranks * count
            return mean + latency * 2 * (ranks - 1) + (8 * sent / bits + element * count / 4) * (count > 100)
        out = a_node * (size - a_node) * count if ranks == size else (ranks - 1) * count
        return collective + message * (ranks - 1) + 8 * out / bits * (count > 100)

    groups = [list(range(first, first + a_node)) for first in range(0, size, a_node)]
    clock: Any = Times(size, seconds)
    found = network.measure_network(clock, groups, silent)
    assert found.estimated == []
    assert found.bandwidth == pytest.approx(bits)
    assert found.seconds["message"] == pytest.approx(message)
    assert found.seconds["latency"] == pytest.approx(latency)
    assert found.seconds["collective"] == pytest.approx(collective)
    assert found.seconds["mean"] == pytest.approx(mean)
    assert found.seconds["float32"] == pytest.approx(element)
    assert found.seconds["byte"] == pytest.approx(0, abs=1e-15)
    assert (found.inside is None) is (a_node == 1)


def test_alone_there_is_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match=r"1 rank: there is no network to measure. Start it as the job is"):
        measured(1)


def test_ranks_on_different_devices_are_named() -> None:
    def work(rank: int) -> str:
        device = torch.device("meta" if rank == 1 else "cpu")
        with pytest.raises(ValueError, match="different devices") as refused:
            calibrate.calibrate(find_communicator()[0], device, 0.0, silent, "threads")
        return str(refused.value)

    for said in hvd_saef.run_workers(3, work):
        assert "cpu on ranks [0, 2]; meta on ranks [1]" in said


def test_all_ranks_fail_together() -> None:
    def work(rank: int) -> Exception:
        def call() -> None:
            if rank == 1:
                raise OSError("no memory is left")

        with pytest.raises((OSError, WorkerError)) as failed:
            Clock(find_communicator()[0], CPU, 0.0).time(call)
        return failed.value

    first, second = hvd_saef.run_workers(2, work)
    assert isinstance(second, OSError)
    assert isinstance(first, WorkerError)
    assert "rank 1 raised OSError: no memory is left" in str(first)


def joined(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[int]:
    """What the command returned on two threads that take themselves for its ranks."""
    monkeypatch.setattr(calibrate, "join", lambda: (find_communicator()[0], CPU, "threads"))
    monkeypatch.setenv("HVD_SAEF_STALL_ABORT_S", "0")
    return hvd_saef.run_workers(2, lambda rank: calibrate.run(path, 0.0))


@pytest.mark.parametrize(
    ("where", "says"),
    [("", "is a folder"), ("no/such/mine.json", "cannot be written: a file in an existing")],
)
def test_a_file_that_cannot_be_written_is_told_at_once(
    where: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "calibrate", None)  # not even begun
    assert joined(monkeypatch, tmp_path / where) == [1, 1]
    said = capsys.readouterr().err
    assert says in said
    assert "hvd-saef calibrate, rank 0 on " in said
    assert "hvd-saef calibrate, rank 1 on " in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("bar", [True, False])
def test_the_command_writes_the_file(
    bar: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not bar:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    else:
        pytest.importorskip("tqdm")
    path = tmp_path / "mine.json"
    assert joined(monkeypatch, path) == [0, 0]
    assert [found.name for found in tmp_path.iterdir()] == ["mine.json"]
    said = capsys.readouterr()
    assert f"Written: {path}" in said.out
    for stage in ("payloads: the latency", "sign DC: encoding and decoding", "a step with overlap=True"):
        assert stage in said.err
    assert ("100%" in said.err) is bar
    assert Constants.load(path).network == "threads between hosts"


def test_a_bar_counts_to_its_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    for speaks in (True, False):
        progress = Progress(2, speaks)
        progress.begin("one")
        progress.begin("two")
        progress.end(done=speaks)
        assert capsys.readouterr().err == ("1/2: one\n2/2: two\n" if speaks else "")


JOB = ["-W", "ignore", "-m", "hvd_saef.cli", "calibrate", "--seconds", "0", "--out"]


def check_job(path: Path, said: str, carrier: str) -> None:
    """What a real job of two ranks on this host wrote and said."""
    assert f"Written: {path}" in said
    known = Constants.load(path)
    assert carrier in known.network
    assert json.loads(path.read_text())["made"]["ranks"] == 2
    job = plan.Job((160_000,) * 160, 64, 1e10, 0.1)
    assert plan.predict(plan.UNCOMPRESSED, job, known) > job.compute


def test_over_torch_distributed(tmp_path: Path) -> None:
    ended = run_ranks(2, [*JOB, str(tmp_path / "mine.json")])
    assert [rank.code for rank in ended] == [0, 0], ended
    assert "Written" not in ended[1].said
    check_job(tmp_path / "mine.json", ended[0].said, "torch.distributed with gloo")


@pytest.mark.xdist_group("mpi")
def test_over_mpi(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="needs mpi4py")
    pytest.importorskip("horovod.torch", reason="needs Horovod")
    job = run_job([MPIRUN, "-np", "2", sys.executable, *JOB, str(tmp_path / "mine.json")])
    assert job.returncode == 0, job.stdout[-5000:] + job.stderr[-5000:]
    check_job(tmp_path / "mine.json", job.stdout, "means by Horovod")
