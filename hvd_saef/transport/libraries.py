"""Imports Horovod and mpi4py when they are first needed, so that `import hvd_saef` starts no MPI. Local."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import Any

_missing: dict[str, str] = {}


@cache
def horovod() -> Any:
    """Returns the module horovod.torch, or None if it cannot be imported. MPI starts in hvd.init() only."""
    return _import("horovod.torch")


def loaded_horovod() -> Any:
    """Returns the module horovod.torch if anything has imported it, else None: nobody uses it then."""
    return sys.modules.get("horovod.torch")


@cache
def mpi4py() -> Any:
    """Returns the module mpi4py.MPI, or None if it cannot be imported. Starts MPI, unless it has started."""
    return _import("mpi4py.MPI")


def missing() -> list[str]:
    """Returns why MPI or Horovod cannot be imported, one text each; [] if both can.

    Without both of them only the simulation works. Starts MPI.
    """
    horovod(), mpi4py()
    return list(_missing.values())


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # mpi4py raises RuntimeError without MPI
        _missing[name] = f"{name} cannot be imported ({error})"
        return None
