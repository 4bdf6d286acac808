"""The kernels in plain torch, the twins of the others, for any device and dtype. Local.

They compute C alone; the rows of Algorithm 1 around it are `PlainRows` in `memory/algorithm.py`.
"""

from __future__ import annotations

import torch

from hvd_saef.kernels.twins.magnitudes import at_most
from hvd_saef.kernels.twins.sign import sign_decode, sign_encode, sign_settle
from hvd_saef.kernels.twins.topk import topk_decode, topk_encode

FUSES, UNEQUAL_WEIGHTS, NARROW_POINTS = False, True, False


def describe() -> str:
    """See :meth:`Version.describe`."""
    return "plain torch"


def takes(device: torch.device, dtype: torch.dtype) -> bool:
    """See :meth:`Version.takes`."""
    return True


def raise_refusals() -> None:
    """See :meth:`Version.raise_refusals`: decoding has raised them."""


__all__ = [
    "FUSES",
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
