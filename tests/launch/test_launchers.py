"""launch/mpirun.sh and horovodrun.sh hand each MPI its own options: with stand-ins for both commands."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.mpi.launch import HOROVODRUN, LIMIT, MPIRUN, ROOT

VERSIONS = {
    "Open MPI 4": "mpirun (Open MPI) 4.1.8\n\nReport bugs to http://www.open-mpi.org/community/help/",
    "Open MPI 5": "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/",
    "MPICH": "HYDRA build details:\n    Version:       5.0.2\n    Configure options:    --with-pm=hydra",
    "Intel MPI": "Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626\nCopyright Intel",
}
"""The first lines of `mpirun --version`."""
HYDRA = ["MPICH", "Intel MPI"]


def started(folder: Path, launcher: str, version: str, *arguments: str, **settings: str) -> tuple[str, str]:
    """The command line that the launcher ends in, and the environment in lines; or what it says, and ""."""
    path = folder / "bin"
    path.mkdir(exist_ok=True)
    for command in ("mpirun", "mpiexec.hydra", "horovodrun"):
        (path / command).write_text(
            f'#!/bin/sh\nif [ "$*" = --version ]; then cat "{folder}/version"; exit; fi\n'
            f'echo {command} "$@"\nmpirun --version | grep -c -e MPICH -e Intel\nenv\n'
        )
        (path / command).chmod(0o755)
    (folder / "version").write_text(version + "\n")
    environment = {"PATH": f"{path}:{os.environ['PATH']}", "VENV": str(folder), "HVD_SAEF_KERNELS": "twins"}
    job = subprocess.run(
        [launcher, *arguments], env=environment | settings, capture_output=True, text=True, timeout=LIMIT
    )
    if job.returncode:
        return job.stderr, ""
    command, _, rest = job.stdout.partition("\n")
    return command, rest


@pytest.mark.parametrize("mpi", VERSIONS)
def test_ranks_on_this_machine(mpi: str, tmp_path: Path) -> None:
    """More ranks than cores, bound to none, in the same environment."""
    command, environment = started(tmp_path, MPIRUN, VERSIONS[mpi], "-np", "4", "true")
    if mpi in HYDRA:  # Intel MPI's mpirun would keep signals from its ranks
        start = "mpirun -bind-to none" if mpi == "MPICH" else "mpiexec.hydra"
        assert command == f"{start} -np 4 true"
        assert ("I_MPI_PIN=0" in environment) is (mpi == "Intel MPI")
    else:
        assert command.startswith("mpirun --bind-to none --map-by slot:OVERSUBSCRIBE -x ")
        assert "-x PATH" in command
        assert "-x HVD_SAEF_KERNELS" in command  # else ranks on other hosts would not know
        assert command.endswith(" -np 4 true")
    for gives_way in (
        "OMPI_MCA_mpi_yield_when_idle=1",
        "MPIR_CVAR_ENABLE_HEAVY_YIELD=1",
        "I_MPI_THREAD_YIELD=2",
    ):
        assert gives_way in environment


@pytest.mark.parametrize("mpi", VERSIONS)
def test_ranks_on_a_list_of_hosts(mpi: str, tmp_path: Path) -> None:
    settings = {"HOSTS": "a:2,b:2", "INTERFACE": "ib0", "BINDING": "core"}
    command, environment = started(tmp_path, MPIRUN, VERSIONS[mpi], "true", **settings)
    open_mpi = "--map-by slot -H a:2,b:2 --mca pml ob1 --mca btl_tcp_if_include ib0"
    options = {
        "Open MPI 4": f"{open_mpi} --mca oob_tcp_if_include ib0",
        "Open MPI 5": f"{open_mpi} --prtemca oob_tcp_if_include ib0",
        "MPICH": "-bind-to core -hosts a:2,b:2 -iface ib0",
        "Intel MPI": "-hosts a:2,b:2 -iface ib0",
    }
    assert f" {options[mpi]} " in command
    said = {"FI_PROVIDER=tcp", "FI_TCP_IFACE=ib0", "UCX_TLS=tcp,self", "UCX_NET_DEVICES=ib0"}
    assert said & set(environment.splitlines()) == (said if mpi in HYDRA else set())
    assert ("I_MPI_PIN_DOMAIN=core" in environment) is (mpi == "Intel MPI")


def test_an_mpi_that_is_not_known(tmp_path: Path) -> None:
    said, _ = started(tmp_path, MPIRUN, "mpirun of Nowhere 1.0", "-np", "4", "true")
    assert said.startswith("mpirun.sh: mpirun of Nowhere 1.0: only Open MPI's, MPICH's and Intel MPI's")


@pytest.mark.parametrize("mpi", VERSIONS)
def test_horovodrun(mpi: str, tmp_path: Path) -> None:
    settings = {"HOSTS": "a:2,b", "INTERFACE": "ib0"}
    command, environment = started(tmp_path, HOROVODRUN, VERSIONS[mpi], "true", **settings)
    binding = "" if mpi in HYDRA else " --binding-args=--bind-to none --map-by slot"
    assert command == f"horovodrun{binding} -np 3 -H a:2,b --network-interface ib0 true"
    assert environment.startswith("0\n") is (mpi not in HYDRA)  # Horovod looks for the name of the MPI
    assert ("FI_TCP_IFACE=ib0" in environment) is (mpi in HYDRA)
    assert ("I_MPI_PIN=0" in environment) is (mpi == "Intel MPI")


@pytest.mark.parametrize(("mpi", "word"), list(zip(VERSIONS, ["pmix", "pmix", "pmi2", "pmi2"], strict=True)))
def test_srun(mpi: str, word: str, tmp_path: Path) -> None:
    ask = f'. "{ROOT}/launch/environment.sh"; exec echo "$(srun_mpi)"'
    command, _ = started(tmp_path, "bash", VERSIONS[mpi], "-c", ask)
    assert command == word


def test_no_job_is_started_otherwise() -> None:
    """What MPI at hand needs is known in one place: no test and no benchmark calls mpirun by itself."""
    pattern = re.compile(r"""\[\s*"(?:mpirun|mpiexec|horovodrun)",""")
    assert pattern.search('["mpirun", "-np"]')
    files = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [path for path in files if path != Path(__file__) and pattern.search(path.read_text())] == []
