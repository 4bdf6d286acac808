"""Horovod and mpi4py, imported when they are first needed: `import hvd_saef` starts no MPI. Local."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

_missing: dict[str, str] = {}


@cache
def horovod() -> Any:
    """`horovod.torch`, or None where it cannot be imported. Starts no MPI: hvd.init() does."""
    return _import("horovod.torch")


@cache
def mpi4py() -> Any:
    """`mpi4py.MPI`, or None where it cannot be imported. Starts MPI, unless hvd.init() has."""
    return _import("mpi4py.MPI")


def missing() -> list[str]:
    """Why there is no MPI or no Horovod, if so: then only the simulation works."""
    horovod(), mpi4py()
    return list(_missing.values())


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # mpi4py without an MPI library: RuntimeError
        _missing[name] = f"{name} cannot be imported ({error})"
        return None
