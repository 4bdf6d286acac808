"""Algorithm 1 of Xu, Huo and Huang, "Step-Ahead Error Feedback", for one bucket. No MPI, no hooks.

The paper's symbols, which the arguments carry:

x   the consensus point (the paper's x_t), the same bits on every worker
e   this worker's error (e_t^k); s the server's error (e_t)
b   the start point of the local steps, x - α·e - β·s (x_{t+1/2}^k); y their end point (x_{t+1}^k)
Δ   what the worker would like to send, e + b - y (Δ_{t+1}^k); D the server's, s + mean C(Δ) (Δ_{t+1})
C   the compressor; u the update that all workers apply, C(D), or mean C(Δ) with single-way compression

Three differences from the paper: α, between EF (0) and SAEF (1), is the coefficient of SA-PEF; β steps
ahead by the server's error too; and the server runs on every worker, or a part of it on each.

A round is row 1 (averaging, which the exchange does), :func:`step_ahead`, the local steps,
:func:`send`, :func:`serve` (double-way only) and :func:`receive`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hvd_saef.compression import BlockedTensor, Compressor


def step_ahead(x: Tensor, e: Tensor, s: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Row 2: b = x - α·e - β·s. `s` is needed only where β > 0. Returns new memory."""
    b = x.clone()
    if alpha:
        b.sub_(e if alpha == 1 else e * alpha)  # the product apart: a fused one would round differently
    if beta and s is not None:
        b.sub_(s if beta == 1 else s * beta)
    return b


def add_update(e: Tensor, b: Tensor, y: Tensor) -> None:
    """Row 4, first half: Δ = e + b - y, in e's memory. `b` is used up."""
    e.add_(b.sub_(y))


def send(delta: BlockedTensor, compressor: Compressor, payload: Tensor) -> None:
    """Row 4, second half: write C(Δ) into `payload`, and e ← Δ - C(Δ) in Δ's memory."""
    compressor.encode(delta, payload)


def serve(
    payloads: Sequence[Tensor], weight: float, s: BlockedTensor, compressor: Compressor, answer: Tensor
) -> None:
    """Row 5': D = s + Σ weight·C(Δ_k), in rank order; write u = C(D) into `answer`, and s ← D - u."""
    for payload in payloads:
        compressor.decode_add(payload, s, weight)
    compressor.encode(s, answer)


def receive(payloads: Sequence[Tensor], weight: float, x: BlockedTensor, compressor: Compressor) -> None:
    """Row 6: x ← x - u, where u = Σ weight·C(...), in rank order.

    The payloads are the server's one answer with weight 1, or (row 5) all workers' with weight 1/K.
    """
    for payload in payloads:
        compressor.decode_add(payload, x, -weight)
