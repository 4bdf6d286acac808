from collections.abc import Sequence

from torch import Tensor

def instruction_sets() -> list[str]:
    """Those this CPU has, of "baseline", "avx2" and "avx512"."""

def set_instruction_set(name: str) -> str:
    """For tests: use this one from now on. Returns the one used so far."""

def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is infinite or NaN. Strided CPU tensors of float16, bfloat16, float32 or float64."""
