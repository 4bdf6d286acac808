"""The kernels in Triton, for GPUs.

With TRITON_INTERPRET=1, set before the first use, Triton's interpreter runs them on the CPU: slow, but exact.
Importing this module raises ImportError if there is no Triton, or one that is older than those tried. Local.
"""

from __future__ import annotations

import torch
import triton

from hvd_saef.kernels.on_triton import tried  # noqa: F401  (first: an old Triton may not import the others)
from hvd_saef.kernels.on_triton.magnitudes import at_most
from hvd_saef.kernels.on_triton.sign import sign_decode, sign_encode, sign_settle
from hvd_saef.kernels.on_triton.tables import INTERPRETED
from hvd_saef.kernels.on_triton.topk import raise_refusals, topk_decode, topk_encode

FUSES, UNEQUAL_WEIGHTS, NARROW_POINTS = True, True, True
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Memory is of the first two; numbers are looked at in all."""


def describe() -> str:
    """See :meth:`Version.describe`."""
    return f"Triton {triton.__version__}{', interpreted' if INTERPRETED else ''}"


def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """See :meth:`Version.takes`."""
    return device.type == ("cpu" if INTERPRETED else "cuda") and dtype in DTYPES


__all__ = [
    "FUSES",
    "INTERPRETED",
    "NARROW_POINTS",
    "UNEQUAL_WEIGHTS",
    "at_most",
    "describe",
    "raise_refusals",
    "sign_decode",
    "sign_encode",
    "sign_settle",
    "takes",
    "topk_decode",
    "topk_encode",
]
