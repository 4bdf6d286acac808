"""The versions of the kernels that can be used here, with their operations for one stretch. For tests."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.kernels import Stretch, Version

_loaded = kernels.load("compiled")
compiled: Any = None if isinstance(_loaded, str) else _loaded
"""The version in C++, or None where it is not built."""


def without_interpreter() -> str:
    """Why Triton's interpreter cannot run here, though Triton loads; or nothing."""
    triton: Any = sys.modules.get("triton")
    if triton and triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "the interpreter of Triton 3.6 needs NumPy 2.3 or older"
    return ""


class Direct:
    """The operations of a version on one stretch, whose tensors are arguments. All weights are `weight`."""

    def __init__(self, version: Version) -> None:
        self.version = version

    def sign_encode(
        self,
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
        """See :meth:`Version.sign_encode`."""
        stretch = Stretch(delta, runs, payload, x, s, points, payloads)
        self.version.sign_encode([stretch], alpha, beta, len(payloads) * [weight])

    def sign_decode(
        self,
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
        """See :meth:`Version.sign_decode`."""
        stretch = Stretch(out, runs, sent, e, s, points, payloads)
        self.version.sign_decode([stretch], alpha, beta, len(payloads) * [weight])

    def sign_settle(self, memory: Tensor, runs: Tensor, payload: Tensor) -> None:
        """See :meth:`Version.sign_settle`."""
        self.version.sign_settle([Stretch(memory, runs, payload)])

    def topk_encode(
        self,
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
        """See :meth:`Version.topk_encode`."""
        stretch = Stretch(delta, runs, payload, x, s, points, payloads)
        self.version.topk_encode([stretch], value_dtype, alpha, beta, len(payloads) * [weight])
