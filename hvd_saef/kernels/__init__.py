"""Loops over flat memory. Nothing here knows the algorithm, workers or MPI. Local.

Each loop exists twice: as a kernel in C++ (`csrc`, called by `compiled.py`), which makes one pass over
memory on all of torch's threads, and as its twin in plain torch (`twins.py`), which gives the same bits on
any device. `native` is the module of the kernels; if it is None, the twins do everything, slower.

The environment variable HVD_SAEF_KERNELS=twins turns the kernels off. If they were not built or do not load,
the first use warns once and says how to build them.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from hvd_saef.kernels import twins
from hvd_saef.kernels.pieces import Pieces, is_gapless
from hvd_saef.kernels.twins import l1_norms, pack_signs, top_k, unpack_signs

_REQUESTED = os.environ.get("HVD_SAEF_KERNELS", "")
if _REQUESTED not in ("", "twins"):
    raise ValueError(f"HVD_SAEF_KERNELS={_REQUESTED!r}: 'twins' is allowed, or nothing.")

_NUMBERS = (torch.float32, torch.float64)
_reason = ""  # why the kernels cannot be loaded; "" if the user turned them off
try:
    if _REQUESTED == "twins":
        raise ImportError
    from hvd_saef.kernels import compiled as native
except ImportError as error:
    native = None  # type: ignore[assignment]
    if _REQUESTED != "twins":
        _reason = str(error)


def why_none() -> str:
    """Returns why the kernels cannot be loaded; "" if they can, or if HVD_SAEF_KERNELS=twins is set."""
    return _reason


def available() -> bool:
    """Returns True if the kernels can be used (on CPU tensors).

    Warns once if they cannot, unless HVD_SAEF_KERNELS=twins is set.
    """
    if native is None and _reason:
        _warn()
    return native is not None


def native_for(flat: Tensor) -> ModuleType | None:
    """Returns the kernels' module if it can process `flat` (float32 or float64 on the CPU), else None."""
    return native if flat.is_cpu and flat.dtype in _NUMBERS and available() else None


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Returns True if no element of any tensor is infinite or NaN, for any floating dtypes and devices."""
    return _magnitudes(tensors, twins.largest, twins.all_finite)


def squares_fit(tensors: Sequence[Tensor]) -> bool:
    """Returns True if no element of any tensor is NaN, infinite, or so large that its square is infinite.

    The tensors may have any floating dtypes and devices. Squares are taken in float32, and those of float64
    in float64: Adam keeps such squares of gradients. Numbers within this limit are far too small for sums of
    a few of them to overflow.
    """
    return _magnitudes(tensors, twins.largest_root, twins.squares_fit)


def _magnitudes(
    tensors: Sequence[Tensor],
    limit: Callable[[torch.dtype], float],
    twin: Callable[[Sequence[Tensor]], bool],
) -> bool:
    """Returns True if no magnitude exceeds the limit of its dtype; uses the kernel where it can be used."""
    kinds: dict[tuple[bool, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.is_cpu, tensor.dtype), []).append(tensor)
    rest: list[Tensor] = []
    for (_, dtype), some in kinds.items():
        if native_for(some[0]) is None:
            rest += some
        elif not native.at_most(some, limit(dtype)):
            return False
    return twin(rest)


@functools.cache
def _warn() -> None:
    warnings.warn(
        f"hvd_saef computes with plain torch, slowly: its C++ kernels do not load ({_reason}). Build them "
        "where a C++17 compiler is: install hvd_saef again, or in a checkout `make setup` or `python "
        "setup.py build_ext --inplace`; or set HVD_SAEF_KERNELS=twins if this is as you want it.",
        RuntimeWarning,
        stacklevel=3,
    )


__all__ = [
    "Pieces",
    "all_finite",
    "available",
    "is_gapless",
    "l1_norms",
    "native",
    "native_for",
    "pack_signs",
    "squares_fit",
    "top_k",
    "unpack_signs",
    "why_none",
]
