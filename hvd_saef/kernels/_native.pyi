from collections.abc import Sequence

import torch
from torch import Tensor

def instruction_sets() -> list[str]:
    """Those this CPU has, of "baseline", "avx2" and "avx512"."""

def set_instruction_set(name: str) -> str:
    """For tests: use this one from now on. Returns the one used so far."""

def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is infinite or NaN. Strided CPU tensors of float16, bfloat16, float32 or float64."""

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
