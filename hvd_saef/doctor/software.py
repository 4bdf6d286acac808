"""Checks of versions, and that parts were built for each other. Local."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

import hvd_saef
from hvd_saef import kernels
from hvd_saef.doctor.findings import BOOTSTRAP, REBUILD, Finding, failure, ok, warning
from hvd_saef.doctor.jobs import MPI, Job, is_installed
from hvd_saef.transport.libraries import horovod


def check_python() -> Finding:
    """Reports the versions of Python and of this package."""
    version = platform.python_version()
    return ok("hvd_saef", f"{hvd_saef.__version__} in {Path(hvd_saef.__file__).parent}, Python {version}")


def check_torch() -> Finding:
    """Warns of torch versions older than those that were tried."""
    oldest = _oldest_torch()
    if _numbers(torch.__version__) < _numbers(oldest):
        return warning(
            "torch", f"{torch.__version__}, older than what was tried", f"install torch {oldest} or newer"
        )
    return ok("torch", torch.__version__)


def _oldest_torch() -> str:
    """Returns the oldest torch that this package asks for; "0" if the package is not installed."""
    try:
        requirements = importlib.metadata.requires("hvd_saef") or []
    except importlib.metadata.PackageNotFoundError:
        return "0"
    return next(name.removeprefix("torch>=") for name in requirements if name.startswith("torch>="))


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


def check_kernels() -> Finding:
    """Reports whether the C++ kernels are used, or their slower twins in plain torch."""
    if kernels.requested() == "twins":
        return warning("kernels", "set aside by HVD_SAEF_KERNELS=twins: slower", "unset HVD_SAEF_KERNELS")
    if kernels.requested() == "triton":
        triton = kernels.load("on_triton")
        if isinstance(triton, str):
            return failure(
                "kernels", f"HVD_SAEF_KERNELS=triton: they do not load ({triton})", "pip install triton"
            )
        return ok("kernels", triton.describe())
    compiled = kernels.load("compiled")
    if not isinstance(compiled, str):
        return ok("kernels", compiled.describe())
    return warning(
        "kernels",
        f"plain torch is used, slower: the compiled ones do not load ({compiled})",
        "install again where a C++17 compiler is; in a checkout, python setup.py build_ext --inplace",
    )


def check_not_needed(job: Job) -> Iterator[Finding]:
    """Reports Horovod and mpi4py where torch.distributed carries the updates; neither is imported."""
    for name, package in (("Horovod", "horovod"), ("mpi4py", "mpi4py")):
        there = f"{_version(package)}, not used" if is_installed(package) else "not installed"
        yield ok(name, f"{there}; torch.distributed carries the updates")


def check_horovod(job: Job) -> Iterator[Finding]:
    """Checks that Horovod is installed, was built for this torch, and was built with MPI."""
    spec = importlib.util.find_spec("horovod")
    if spec is None or spec.origin is None:
        yield failure("Horovod", "is not installed", BOOTSTRAP)
        return
    built_for = _built_for(Path(spec.origin).parent / "metadata.json")
    if built_for and built_for != torch.__version__:
        found = f"was built for torch {built_for}, and {torch.__version__} is installed"
        yield failure("Horovod", found, REBUILD)
    hvd = horovod()
    if hvd is None:
        why = import_error("horovod.torch")
        fix = REBUILD if "undefined symbol" in why else BOOTSTRAP
        yield failure("Horovod", f"cannot be imported: {why}", fix)
        return
    if not hvd.mpi_built():
        found = "was built without MPI, by which payloads travel"
        yield failure("Horovod", found, "build it with HOROVOD_WITH_MPI=1: " + REBUILD)
    elif not built_for or built_for == torch.__version__:
        parts = ["MPI"] + ["NCCL"] * bool(hvd.nccl_built()) + ["Gloo"] * bool(hvd.gloo_built())
        yield ok(
            "Horovod",
            f"{_version('horovod')} for torch {built_for or 'unknown'}, built with {', '.join(parts)}",
        )


def _built_for(metadata: Path) -> str:
    try:
        return str(json.loads(metadata.read_text()).get("pytorch", ""))
    except (OSError, ValueError):
        return ""


def _version(package: str) -> str:
    """Returns the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


def import_error(module: str) -> str:
    """Returns in words why a module does not import."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it was not importable when hvd_saef was imported"


def check_gpu(job: Job) -> Finding:
    """Checks that what carries has NCCL, where torch sees a GPU."""
    if not torch.cuda.is_available():
        return ok("GPU", "none seen by torch")
    found = f"{torch.cuda.device_count()}, {torch.cuda.get_device_name(0)}"
    if job.carrier != MPI:
        if dist.is_nccl_available():
            return ok("GPU", f"{found}, NCCL in torch.distributed")
        fix = 'install a torch with NCCL, for init_process_group("cpu:gloo,cuda:nccl")'
        return warning("GPU", f"{found}, but this torch has no NCCL: payloads go through host memory", fix)
    hvd = horovod()
    if hvd is not None and not hvd.nccl_built():
        return warning("GPU", f"{found}, but Horovod was built without NCCL", "launch/bootstrap.sh --cuda")
    return ok("GPU", f"{found}, NCCL in Horovod")


def versions() -> dict[str, str]:
    """Returns the versions that must be the same on all ranks, by name."""
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "hvd_saef": hvd_saef.__version__,
    }
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    found |= {name: installed.get(name, "not installed") for name in ("horovod", "mpi4py", "numpy")}
    found["byte order"] = sys.byteorder
    return found
