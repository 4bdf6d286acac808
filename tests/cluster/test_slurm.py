"""The templates of launch/slurm, submitted to a real SLURM of two nodes with two cores each."""

from __future__ import annotations

import csv
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm as module
from tests.cluster.slurm import Slurm
from tests.mpi.launch import ENVIRONMENT, LIMIT, ROOT

pytest.importorskip("horovod.torch", reason="needs Horovod")
pytest.importorskip("mlxtend", reason="needs the extra [examples]")

RANKS = 4
STEPS = 60
QUICK = ["--methods", "SAEF-SignSGDM-DC", "--epochs", "2", "--cut", "2"]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """One for all tests of this file."""
    reason = module.why_not()
    if reason:
        pytest.skip(f"no SLURM here: {reason}")
    with Slurm() as running:
        yield running


def wait_for(log: Path, words: str, times: int = 1, timeout: float = LIMIT) -> None:
    """Until the log says so, so often."""
    deadline = time.monotonic() + timeout
    while not log.exists() or log.read_text().count(words) < times:
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.05)


def hash_in(log: Path) -> str:
    """Of the x that examples/preemptible.py ended with, which it has found the same on all ranks."""
    found = re.findall(r"x has the hash (\w{64})", log.read_text())
    assert len(found) == 1, log.read_text()
    return str(found[0])


@pytest.fixture(scope="module")
def uninterrupted(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of x after a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = ["--checkpoint", str(folder / "checkpoint"), "--steps", str(STEPS)]
    number = slurm.submit("train.sbatch", folder / "log", "examples/preemptible.py", *arguments)
    assert slurm.wait(number)["ExitCode"] == "0:0", (folder / "log").read_text()
    return hash_in(folder / "log")


def stand_in(folder: Path) -> str:
    """A PATH on which apptainer is a script that runs the command without a container."""
    (folder / "bin").mkdir()
    script = folder / "bin" / "apptainer"
    script.write_text(
        '#!/bin/sh\n[ "$1" = exec ] && [ "$2" = --bind ] && [ -d "${3#*,}" ] && [ -e "$4" ] || exit 64\n'
        f'echo "bound $3" >>{folder}/apptainer.log\nshift 4\nexec "$@"\n'
    )
    script.chmod(0o755)
    (folder / "image.sif").touch()
    return f"{folder}/bin:{ENVIRONMENT['PATH']}"


@pytest.mark.parametrize("template", ["train.sbatch", "mpirun.sbatch", "apptainer.sbatch", "torch.sbatch"])
def test_the_quick_start(slurm: Slurm, template: str, tmp_path: Path) -> None:
    log, output = tmp_path / "log", tmp_path / "results"
    settings = {}
    if template == "apptainer.sbatch":
        settings = {"PATH": stand_in(tmp_path), "IMAGE": str(tmp_path / "image.sif")}
    arguments = ["-m", "tests.cluster.quickstart", *QUICK, "--output", str(output)]
    number = slurm.submit(template, log, *arguments, **settings)
    job = slurm.wait(number)
    said = log.read_text()
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), said
    assert (job["NodeList"], job["NumTasks"]) == ("h[0-1]", str(RANKS))
    rows = list(csv.DictReader((output / "metrics.csv").open()))
    assert len(rows) == 2
    assert 0 < float(rows[1]["training_loss"]) < 1.5, said  # log 10 = 2.3 at the start
    assert float(rows[1]["bytes_sent"]) > 0
    if template == "apptainer.sbatch":
        assert (tmp_path / "apptainer.log").read_text().count("bound") == RANKS


def test_the_papers_experiments(slurm: Slurm, tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = ["-m", "benchmarks.paper", "run", "digits", "--mpi", "--out", str(tmp_path)]
    arguments += ["--seeds", "0", "--methods", "SAEF-SignSGDM-DC"]
    job = slurm.wait(slurm.submit("train.sbatch", log, *arguments))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
    rows = list(csv.DictReader((tmp_path / "digits" / "SAEF-SignSGDM-DC-seed0.csv").open()))
    assert len(rows) == 3
    assert 0 < float(rows[2]["training_loss"]) < float(rows[0]["training_loss"]) < 2.3  # log 10


@pytest.mark.parametrize("template", ["train.sbatch", "requeue.sbatch"])
def test_without_arguments(slurm: Slurm, template: str, tmp_path: Path) -> None:
    unwanted = shutil.ignore_patterns(".*", "runs", "build")
    checkout = shutil.copytree(ROOT, tmp_path / "checkout", ignore=unwanted)  # results go there
    log = tmp_path / "log"
    number = slurm.submit(template, log, PROJECT=str(checkout))
    job = slurm.wait(number)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), log.read_text()
    if template == "train.sbatch":
        rows = list(csv.DictReader((checkout / "runs" / "quickstart" / "metrics.csv").open()))
        assert len(rows) == 4 * 8
        assert all(float(row["training_loss"]) < 0.2 for row in rows if row["epoch"] == "8")
    else:
        assert len(hash_in(log)) == 64


def test_a_requeued_job_ends_with_the_same_bits(slurm: Slurm, uninterrupted: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    slow = tmp_path / "slow"
    slow.touch()  # a minute for a signal to come in time
    arguments = ["--checkpoint", str(tmp_path / "checkpoint"), "--steps", str(STEPS)]
    arguments += ["--slow-while", str(slow)]
    number = slurm.submit("requeue.sbatch", log, "examples/preemptible.py", *arguments)
    for restart, ask in enumerate(["USR1", "TERM", "USR1"]):
        wait_for(log, "trains from step", restart + 1)
        # To the steps' processes on both nodes, as SLURM does before the limit (--signal) or to preempt.
        slurm.ask("scancel", f"--signal={ask}", str(number), check=True)
        wait_for(log, "stopped and saved after step", restart + 1)
        wait_for(log, "is queued", restart + 1)
        slurm.let_run(number)
    slow.unlink()
    job = slurm.wait(number)
    said = log.read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "3"), said
    starts = [int(step) for step in re.findall(r"trains from step (\d+) on", said)]
    stops = [int(step) for step in re.findall(r"stopped and saved after step (\d+)", said)]
    assert starts == [0, *stops], said
    assert 0 < stops[0] < stops[1] < stops[2] < STEPS
    assert hash_in(log) == uninterrupted


def test_a_requeued_job_over_torch_distributed_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = ["-m", "tests.cluster.stopping", str(tmp_path / "checkpoint")]
    number = slurm.submit("requeue.sbatch", log, *arguments, CARRIER="torch")
    wait_for(log, "is queued")
    slurm.let_run(number)
    job = slurm.wait(number)
    said = log.read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), said
    for rank in range(RANKS):
        assert said.count(f"rank {rank} goes on from step 3") == 1, said
        assert said.count(f"rank {rank} is done") == 1, said


def test_requeueing_has_an_end(slurm: Slurm, tmp_path: Path) -> None:
    log = tmp_path / "log"
    number = slurm.submit("requeue.sbatch", log, "-c", "raise SystemExit(75)", MOST_RESTARTS="0")
    assert slurm.wait(number)["ExitCode"] == "75:0", log.read_text()
    number = slurm.submit("requeue.sbatch", log, "-c", "raise SystemExit(3)")
    job = slurm.wait(number)
    assert (job["ExitCode"], job["Restarts"]) == ("3:0", "0"), log.read_text()


RAISED, KILLED = "OSError: this rank's disk is gone", r"h0: (task 1|tasks 0-1): Killed"


@pytest.mark.parametrize(
    ("template", "how", "why"),
    [
        ("train.sbatch", "raise", RAISED),
        ("train.sbatch", "die", KILLED),
        ("mpirun.sbatch", "raise", RAISED),
        ("requeue.sbatch", "die", KILLED),
        ("torch.sbatch", "raise", RAISED),
        ("torch.sbatch", "die", KILLED),
    ],
)
def test_a_rank_that_fails_ends_the_job(
    slurm: Slurm, template: str, how: str, why: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    number = slurm.submit(template, log, "-m", "tests.cluster.crash", how)
    wait_for(log, "fails now")
    job = slurm.wait(number)
    assert job["JobState"] == "FAILED"
    assert job["ExitCode"] != "0:0"
    assert re.search(why, log.read_text()), log.read_text()


DOCTOR = ["python", "-W", "ignore", "-m", "hvd_saef.cli", "doctor"]


@pytest.mark.parametrize("start", [["--mpi=pmix"], ["--mpi=none", str(ROOT / "launch/slurm/rank.sh")]])
def test_the_doctor(slurm: Slurm, start: list[str]) -> None:
    report = json.loads(slurm.ask("srun", "-N2", f"-n{RANKS}", *start, *DOCTOR, "--json"))
    found = {finding["check"]: finding["found"] for finding in report["findings"]}
    assert found["ranks"] == str(RANKS)
    if start[0] == "--mpi=pmix":
        assert "pmix" in found["srun"]
    else:
        assert found["MASTER_ADDR"].startswith("h0:2")
        assert "gloo takes 10.77.0." in found["interfaces"]
    assert [sorted(link["hosts"]) for link in report["links"]] == [["h0", "h1"]]
    assert report["links"][0]["bits_per_second"] > 0
    assert not [finding for finding in report["findings"] if finding["status"] == "failure"], report


def test_the_doctor_of_ranks_that_nothing_connects(slurm: Slurm) -> None:
    alone = slurm.ask("srun", "--mpi=none", "-N1", "-n2", *DOCTOR)
    assert alone.count("2 processes were started, and MPI sees 1: each would train alone") == 2
