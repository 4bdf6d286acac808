"""Loops over flat memory. Nothing here knows the algorithm, workers or MPI. Local.

`operations.py` says which operations there are. Every version of the kernels is a module that has them all:

* `compiled.py` calls kernels in C++ (`csrc`), which make one pass over memory on all of torch's threads;
* `on_triton` has kernels in Triton, for GPUs;
* `twins` does the same in plain torch on any device, slower.

All give the same bits. :func:`version_for` returns the first version that can work on some memory. The
environment variable HVD_SAEF_KERNELS=twins leaves only the twins. HVD_SAEF_KERNELS=triton leaves only Triton,
on any device: on the CPU, Triton's interpreter is needed (TRITON_INTERPRET=1), which is for tests. If another
version does not load where it would be used, the first use warns once and says how to get it.
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

TRIED: dict[str, dict[str, tuple[str, ...]]] = {
    "": {"cpu": ("compiled", "twins"), "cuda": ("on_triton", "twins"), "": ("twins",)},
    "twins": {"": ("twins",)},
    "triton": {"": ("on_triton",)},
}
"""For each allowed value of HVD_SAEF_KERNELS the versions that are tried, in this order, by the type of the
device; "" is for all other devices. torch calls AMD's devices "cuda" too."""
ADVICE = {
    "compiled": "its C++ kernels do not load. Build them where a C++17 compiler is: install hvd_saef again, "
    "or in a checkout `make setup` or `python setup.py build_ext --inplace`",
    "on_triton": "its Triton kernels do not load. Install Triton: `pip install triton`",
}
"""What is wrong if a version does not load, and how to get it."""

_requested = os.environ.get("HVD_SAEF_KERNELS", "")
if _requested not in TRIED:
    allowed = " and ".join(repr(name) for name in TRIED if name)
    raise ValueError(f"HVD_SAEF_KERNELS={_requested!r}: {allowed} are allowed, or nothing.")
_versions: dict[str, Version | str] = {}


def load(name: str) -> Version | str:
    """Returns the version of this name, or a text that says why it does not load."""
    if name not in _versions:
        try:
            _versions[name] = importlib.import_module(f"hvd_saef.kernels.{name}")
        except ImportError as error:
            _versions[name] = str(error)
    return _versions[name]


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
    """Returns the version of the kernels that works on memory of this device and dtype.

    Raises RuntimeError if HVD_SAEF_KERNELS asks for one that cannot.
    """
    orders = TRIED[_requested]
    order = orders.get(device.type, orders[""])
    for name in order:
        version = load(name)
        if isinstance(version, str):
            if len(order) > 1:
                _warn(name, version)
        elif version.takes(device, dtype):
            return version
    raise RuntimeError(
        f"HVD_SAEF_KERNELS={_requested!r}: these kernels cannot work on {dtype} on {device}. On a GPU, "
        "install Triton; on the CPU, set TRITON_INTERPRET=1 as well; or unset HVD_SAEF_KERNELS."
    )


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


def raise_refusals() -> None:
    """Raises ValueError if kernels refused a payload since the last call, which could not be told at once.

    May wait for devices.
    """
    for version in _versions.values():
        if not isinstance(version, str):
            version.raise_refusals()


def _magnitudes(tensors: Sequence[Tensor], limit: Callable[[torch.dtype], float]) -> bool:
    """Returns True if no magnitude exceeds the limit of its dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return all(version_for(*kind).at_most(some, limit(kind[1])) for kind, some in kinds.items())


@functools.cache
def _warn(name: str, reason: str) -> None:
    warnings.warn(
        f"hvd_saef computes with plain torch, slowly: {ADVICE[name]} ({reason}). Or set "
        "HVD_SAEF_KERNELS=twins if this is as you want it.",
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
    "raise_refusals",
    "requested",
    "squares_fit",
    "version_for",
]
