"""Loops over flat memory. Nothing here knows the algorithm, workers or MPI. Local.

`operations.py` says which operations there are. Every version of the kernels is a module that has them all:
`compiled.py` calls kernels in C++ (`csrc`), which make one pass over memory on all of torch's threads, and
`twins` does the same in plain torch on any device, slower. All give the same bits. :func:`version_for`
returns the first version that can work on a tensor.

The environment variable HVD_SAEF_KERNELS=twins leaves only the twins. If another version does not load where
it would be used, the first use warns once and says how to get it.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hvd_saef.kernels.operations import Stretch, Version
from hvd_saef.kernels.pieces import Pieces, is_gapless
from hvd_saef.kernels.twins import magnitudes

TRIED: dict[str, tuple[str, ...]] = {"": ("compiled", "twins"), "twins": ("twins",)}
"""The versions that are tried, in this order, for each allowed value of HVD_SAEF_KERNELS."""
ADVICE = {
    "compiled": "Build them where a C++17 compiler is: install hvd_saef again, or in a checkout `make setup` "
    "or `python setup.py build_ext --inplace`",
}
"""How to get a version that does not load."""
DEVICES = {"compiled": "cpu"}
"""The device type for which a version is missed if it does not load."""

_requested = os.environ.get("HVD_SAEF_KERNELS", "")
if _requested not in TRIED:
    allowed = ", ".join(repr(name) for name in TRIED if name)
    raise ValueError(f"HVD_SAEF_KERNELS={_requested!r}: {allowed} are allowed, or nothing.")


@functools.cache
def load(name: str) -> Version | str:
    """Returns the version of this name, or a text that says why it does not load."""
    try:
        version: Version = importlib.import_module(f"hvd_saef.kernels.{name}")
    except ImportError as error:
        return str(error)
    return version


def requested() -> str:
    """Returns what HVD_SAEF_KERNELS asks for, "" if it is not set."""
    return _requested


@contextmanager
def only(name: str) -> Iterator[None]:
    """Uses in all threads, while the context is open, what HVD_SAEF_KERNELS=`name` would. For tests."""
    global _requested
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def version_for(device: torch.device, dtype: torch.dtype) -> Version:
    """Returns the version of the kernels that works on memory of this device and dtype."""
    for name in TRIED[_requested]:
        version = load(name)
        if isinstance(version, str):
            if DEVICES[name] == device.type:
                _warn(name, version)
        elif version.takes(device, dtype):
            return version
    raise TypeError(f"no kernels for memory of {dtype} on {device}.")


def fusing(device: torch.device, dtype: torch.dtype, alike: bool) -> Version | None:
    """Returns the version for such memory if it computes the rows around C too, else None.

    Without `alike`, the workers' weights may differ.
    """
    version = version_for(device, dtype)
    return version if version.FUSES and (alike or version.UNEQUAL_WEIGHTS) else None


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Returns True if no element of any tensor is infinite or NaN, for any floating dtypes and devices."""
    return _magnitudes(tensors, magnitudes.largest)


def squares_fit(tensors: Sequence[Tensor]) -> bool:
    """Returns True if no element of any tensor is NaN, infinite, or so large that its square is infinite.

    The tensors may have any floating dtypes and devices. Squares are taken in float32, and those of float64
    in float64: Adam keeps such squares of gradients. Numbers within this limit are far too small for sums of
    a few of them to overflow.
    """
    return _magnitudes(tensors, magnitudes.largest_root)


def _magnitudes(tensors: Sequence[Tensor], limit: Callable[[torch.dtype], float]) -> bool:
    """Returns True if no magnitude exceeds the limit of its dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return all(version_for(*kind).at_most(some, limit(kind[1])) for kind, some in kinds.items())


@functools.cache
def _warn(name: str, reason: str) -> None:
    warnings.warn(
        f"hvd_saef computes with plain torch, slowly: its {name} kernels do not load ({reason}). "
        f"{ADVICE[name]}; or set HVD_SAEF_KERNELS=twins if this is as you want it.",
        RuntimeWarning,
        stacklevel=3,
    )


__all__ = [
    "Pieces",
    "Stretch",
    "Version",
    "all_finite",
    "fusing",
    "is_gapless",
    "load",
    "only",
    "requested",
    "squares_fit",
    "version_for",
]
