"""Checks of MPI, where it carries the updates: one library, calls from several threads, launchers. Local."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from hvd_saef.doctor import vendors
from hvd_saef.doctor.findings import BOOTSTRAP, REBUILD, Finding, failure, ok, output, warning
from hvd_saef.doctor.jobs import Job
from hvd_saef.doctor.software import import_error
from hvd_saef.transport.libraries import mpi4py


def check_mpi(job: Job) -> Iterator[Finding]:
    """Reports mpi4py and its MPI library, and checks that several threads may call the library."""
    MPI = mpi4py()  # noqa: N806 - mpi4py's name for it
    if MPI is None:
        why = import_error("mpi4py.MPI")
        yield failure("mpi4py", f"cannot be imported: {why}", BOOTSTRAP)
        return
    yield ok("mpi4py", importlib.metadata.version("mpi4py"))
    yield ok("MPI library", f"{vendors.name()}, {_library('mpi4py.MPI') or 'not found'}")
    levels = {
        MPI.THREAD_SINGLE: "SINGLE",
        MPI.THREAD_FUNNELED: "FUNNELED",
        MPI.THREAD_SERIALIZED: "SERIALIZED",
    }
    level = levels.get(MPI.Query_thread())
    if level is None:
        yield ok("MPI threads", "MPI_THREAD_MULTIPLE")
    else:
        found = f"MPI_THREAD_{level}: Horovod and hvd_saef talk through MPI from several threads"
        fix = (
            "leave MPI4PY_RC_THREAD_LEVEL and mpi4py.rc.threads alone, or use an MPI with MPI_THREAD_MULTIPLE"
        )
        yield failure("MPI threads", found, fix)


def check_same_library(job: Job) -> Finding | None:
    """Checks that mpi4py and Horovod are linked against one MPI. Returns None if one of them is unknown."""
    ours, theirs = _library("mpi4py.MPI"), _library("horovod.torch.mpi_lib_v2")
    if ours is None or theirs is None:
        return None
    if ours != theirs:
        found = f"mpi4py uses {ours}, Horovod {theirs}"
        return failure("one MPI", found, "both must be built against one MPI: " + REBUILD)
    return ok("one MPI", "mpi4py and Horovod use the same library")


def _library(module: str) -> str | None:
    """Returns the MPI library that the loader finds by itself for an extension module, or None."""
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # the parent package cannot be imported
        spec = None
    origin = spec.origin if spec else _extension(module)
    if origin is None:
        return None
    listed = output("ldd", origin)
    match = re.search(r"lib(?:mpi|mpich|mpi_\w+)\.so\S* => (/\S+)", listed)
    return os.path.realpath(match[1]) if match else None


def _extension(module: str) -> str | None:
    """Returns the file of an extension module whose package does not import, or None."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    found = sorted(Path(spec.origin).parent.joinpath(*parts[:-1]).glob(f"{parts[-1]}.*so"))
    return str(found[0]) if found else None


def check_launcher(job: Job) -> Finding | None:
    """Checks that mpirun on the PATH belongs to the library. Returns None without MPI."""
    if mpi4py() is None:
        return None
    said, ours = output("mpirun", "--version").strip(), vendors.library()
    theirs = vendors.find(said, "launcher")
    named = theirs or (said.splitlines() or [""])[0]
    if not said:
        return ok("mpirun", "none on the PATH: srun starts the ranks")
    if ours is None or (theirs is None and not ours.vendor.launcher):
        return ok("mpirun", f"{named}, {shutil.which('mpirun')}; whether it fits is not known")
    if theirs is None or not theirs.fits(ours):
        found = (
            f"{shutil.which('mpirun')} is of {named}, the library is {ours}: ranks would not find each other"
        )
        return failure(
            "mpirun", found, "put the mpirun of the library first on the PATH: load that module alone"
        )
    return ok("mpirun", f"{named}, {shutil.which('mpirun')}")


def check_cuda_aware(job: Job) -> Finding | None:
    """Reports whether MPI accepts GPU memory, and whether the user has asked for that."""
    asked = os.environ.get("HVD_SAEF_CUDA_AWARE_MPI") == "1"
    library = _library("mpi4py.MPI")
    if mpi4py() is None or library is None:
        return None
    try:
        aware = bool(ctypes.CDLL(library).MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return ok("CUDA-aware MPI", "unknown: this MPI does not say" + "; asked for" * asked)
    if asked and not aware:
        fix = f"unset HVD_SAEF_CUDA_AWARE_MPI, or {vendors.vendor().cuda}"
        return failure("CUDA-aware MPI", "HVD_SAEF_CUDA_AWARE_MPI=1, but this MPI is not", fix)
    if aware and torch.cuda.is_available() and not asked:
        fix = "set HVD_SAEF_CUDA_AWARE_MPI=1 to try it: docs/gpus.md"
        return warning("CUDA-aware MPI", "yes, but payloads go through host memory", fix)
    return ok("CUDA-aware MPI", ("yes" if aware else "no") + (", asked for" if asked else ", not asked for"))


def check_srun(job: Job) -> Finding:
    """Checks that SLURM's srun has the protocol by which it connects the ranks of this MPI."""
    listed = output("srun", "--mpi=list", both=True)
    if "plugin types" not in listed:
        return ok("srun", "no SLURM here")
    wanted = vendors.vendor().srun
    types = sorted(set(re.findall(rf"\b{wanted}\w*", listed)))
    if types:
        return ok("srun", f"has {', '.join(types)}")
    fix = f"start by launch/slurm/mpirun.sbatch, or ask for SLURM with {wanted}"
    return warning("srun", f"has no {wanted}, by which it connects ranks of {vendors.name()}", fix)
