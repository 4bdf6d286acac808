"""The operations of this folder, each of which every version of the kernels has. Local.

A version is a module: `compiled.py` (C++), `on_triton` (Triton) or `twins` (plain torch).
All give the same bits.

`runs` is int64, [n, 4], on the CPU; a row is a run of blocks: its first element, the elements of a block, the
number of blocks, and the number of elements of each block that are sent (for sign: all of them if the block
is dense, else 0). The runs follow one another without gaps from element 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Stretch:
    """Flat memory of whole blocks, and what an operation reads and writes beside it.

    All tensors are 1-D, contiguous and on one device. Payloads are uint8 and may begin at any byte; the other
    tensors have one dtype, float32 or float64, and the length of all runs together.
    """

    memory: Tensor
    """What is encoded, or added to; changed in place."""
    runs: Tensor
    """The memory's blocks."""
    payload: Tensor | None = None
    """The payload that is written; for decoding, the one that this worker sent."""
    other: Tensor | None = None
    """x where `memory` is encoded, e where payloads are added to it."""
    s: Tensor | None = None
    """The server's error, if β > 0."""
    points: Sequence[Tensor] = ()
    """The parameters' own memory: pieces that lie end to end; each run lies within one piece."""
    payloads: Sequence[Tensor] = ()
    """The payloads that are added, in their order, each with its weight."""


Stretches = Sequence[Stretch]
"""Stretches with the same number of payloads. One call works on all of them."""


class Version(Protocol):
    """What a version of the kernels offers. Wrong arguments raise ValueError.

    Each operation takes α and β, the coefficients of b = x - α·e - β·s, and a weight for each payload.
    """

    FUSES: bool
    """True if the operations compute the rows around C too; else `other`, `s` and `points` are not given."""
    UNEQUAL_WEIGHTS: bool
    """True if the weights of one call may differ."""
    NARROW_POINTS: bool
    """True if the points of float32 memory may be float16 or bfloat16 too."""

    def describe(self) -> str:
        """Returns in a few words what this version runs on, for `hvd-saef doctor`."""

    def takes(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Returns True if this version can work on memory of this device and dtype."""

    def sign_encode(
        self, stretches: Stretches, alpha: float = 0.0, beta: float = 0.0, weights: Sequence[float] = ()
    ) -> None:
        """Writes C(Δ) into `payload` and leaves Δ in `memory`, in place (0 in dense blocks).

        A later :meth:`sign_settle` or :meth:`sign_decode` subtracts C(Δ) from it. Δ is the value of `memory`;
        plus (other - α·memory - β·s) - points, if `other` (x) is given; plus Σ weight·C(payload).
        """

    def sign_settle(self, stretches: Stretches) -> None:
        """Subtracts the values of `payload`, which was made from `memory`, from `memory`, in place.

        Dense blocks are left alone: :meth:`sign_encode` has settled them.
        """

    def sign_decode(
        self, stretches: Stretches, alpha: float = 0.0, beta: float = 0.0, weights: Sequence[float] = ()
    ) -> None:
        """Adds Σ weight·C(payload) to `memory`, in place.

        If `other` (e) and `payload`, which was made from e, are given, settles e as :meth:`sign_settle` does.
        Then writes memory - α·e - β·s into `points`.
        """

    def topk_encode(
        self,
        stretches: Stretches,
        value_dtype: torch.dtype,
        alpha: float = 0.0,
        beta: float = 0.0,
        weights: Sequence[float] = (),
    ) -> None:
        """Writes C(Δ) into `payload` and leaves Δ - C(Δ) in `memory`, in place; Δ is as for sign."""

    def topk_decode(
        self,
        stretches: Stretches,
        value_dtype: torch.dtype,
        alpha: float = 0.0,
        beta: float = 0.0,
        weights: Sequence[float] = (),
    ) -> None:
        """Adds Σ weight·C(payload) to `memory`, in place; then writes memory - α·e - β·s into `points`.

        Raises ValueError for bytes that no encoder writes; where the host would have to wait for a device to
        know of them, they are added nowhere, and :meth:`raise_refusals` raises it later.
        """

    def raise_refusals(self) -> None:
        """Raises ValueError if :meth:`topk_decode` has refused a payload since the last call, silently."""

    def at_most(self, tensors: Sequence[Tensor], limit: float) -> bool:
        """Returns True if every element lies from -`limit` to `limit`; NaN does not.

        The tensors have one dtype and device; they may have any shape and strides.
        """
