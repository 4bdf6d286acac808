"""What the machine is and what it lacks; builds the C++ kernels of a plain checkout, if that is possible."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks.gpu.pieces import ROOT, Place, Row
from hvd_saef import kernels

SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
BUILD_SECONDS = 120


def sanitizer() -> str | None:
    """NVIDIA's compute-sanitizer, if it is installed."""
    return next(filter(None, map(shutil.which, SANITIZERS)), None)


def described(name: str) -> str:
    """A version of the kernels in words, or why it does not load."""
    found = kernels.load(name)
    return f"not here: {found}" if isinstance(found, str) else found.describe()


def build() -> str:
    """Builds the C++ kernels in place, if they are not there; returns what became of it."""
    if not isinstance(kernels.load("compiled"), str):
        return described("compiled")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not built: {' '.join(command[1:])} took more than {BUILD_SECONDS} s"
    again = "from hvd_saef import kernels; print(kernels.load('compiled'))"
    found = subprocess.run([sys.executable, "-c", again], cwd=ROOT, capture_output=True, text=True).stdout
    if found.startswith("<module"):
        return "built"
    return f"not built: {(said.stdout + said.stderr).strip()[-300:] or found.strip()}"


def look(place: Place) -> Iterator[Row]:
    """One row with everything that numbers depend on."""
    row: Row = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": described("on_triton"),
        "C++": build(),
        "horovod": "here" if importlib.util.find_spec("horovod") else "not here",
        "compute-sanitizer": sanitizer() or "not here",
        "cores": len(os.sched_getaffinity(0)),
        "commit": _commit(),
        "device": str(place.device),
        "tiny": place.tiny,
    }
    if place.on_gpu:
        properties = torch.cuda.get_device_properties(place.device)
        row |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "driver": _driver(),
        }
    yield row


def line(row: Row) -> str:
    """The row in words."""
    return ", ".join(f"{name} {value}" for name, value in row.items() if name != "piece")


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip().splitlines()[0]
    except (OSError, IndexError):
        return ""
