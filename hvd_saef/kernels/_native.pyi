"""The kernels. All memory is 1-D, contiguous and on the CPU, of one dtype, float32 or float64.

`runs`: int64, [n, 4], a row a run of blocks: first element, elements of a block, number of blocks, and how
many elements of each block travel (Sign: all of them, dense, or 0). `points`: pieces end to end, as long as
all runs; each run lies within one. Payloads may lie at any byte. Wrong arguments are a ValueError.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

def instruction_sets() -> list[str]:
    """Those this CPU has, of "baseline", "avx2" and "avx512"."""

def set_instruction_set(name: str) -> str:
    """For tests: use this one from now on. Returns the one used so far."""

def at_most(tensors: Sequence[Tensor], limit: float) -> bool:
    """Whether no element is larger than `limit`, below minus it, or NaN.

    These tensors are of one dtype, and of any shape and strides.
    """

def topk_encode(
    delta: Tensor,
    runs: Tensor,
    payload: Tensor,
    value_dtype: torch.dtype,
    x: Tensor | None = None,
    s: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
    points: Sequence[Tensor] = (),
    payloads: Sequence[Tensor] = (),
    weight: float = 0.0,
) -> None:
    """Write C(Δ) into `payload` and leave Δ - C(Δ) in `delta`.

    Δ is what `delta` holds; plus (x - alpha·delta - beta·s) - points, if x is given; plus
    Σ weight·C(payload), in their order.
    """

def topk_decode(
    out: Tensor,
    runs: Tensor,
    payloads: Sequence[Tensor],
    value_dtype: torch.dtype,
    weight: float,
    e: Tensor | None = None,
    s: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
    points: Sequence[Tensor] = (),
) -> None:
    """Add Σ weight·C(payload) to `out`, in their order; then points ← out - alpha·e - beta·s."""

def sign_encode(
    delta: Tensor,
    runs: Tensor,
    payload: Tensor,
    x: Tensor | None = None,
    s: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
    points: Sequence[Tensor] = (),
    payloads: Sequence[Tensor] = (),
    weight: float = 0.0,
) -> None:
    """Write C(Δ) into `payload` and leave Δ in `delta` (0 in dense blocks): settle it later.

    Δ is what `delta` holds; plus (x - alpha·delta - beta·s) - points, if x is given; plus
    Σ weight·C(payload), in their order.
    """

def sign_decode(
    out: Tensor,
    runs: Tensor,
    payloads: Sequence[Tensor],
    weight: float,
    e: Tensor | None = None,
    sent: Tensor | None = None,
    s: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 0.0,
    points: Sequence[Tensor] = (),
) -> None:
    """Add Σ weight·C(payload) to `out`, in their order.

    With e and `sent`, the payload that was made of it, e is settled. Then points ← out - alpha·e - beta·s.
    """

def sign_settle(memory: Tensor, runs: Tensor, payload: Tensor) -> None:
    """Subtract from `memory` what `payload`, made of it, says. Dense blocks are settled already."""
