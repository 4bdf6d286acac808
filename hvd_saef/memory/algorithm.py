"""Algorithm 1 of Xu, Huo and Huang, "Step-Ahead Error Feedback", for one bucket.

Local: nothing here uses MPI or hooks. The arguments are named by the paper's symbols:

x   the consensus point (the paper's x_t), which has the same bits on every worker
e   this worker's error (e_t^k); s the server's error (e_t)
b   the start point of the local steps (x_{t+1/2}^k); y their end point (x_{t+1}^k)
Δ   the worker's update before compression (Δ_{t+1}^k); D the server's update before compression (Δ_{t+1})
C   the compressor; u the update that all workers apply

A round consists of these rows. Comments and docstrings everywhere refer to the rows by these numbers:

row  who          what
1    all          every p rounds: ē ← mean of e over the workers (ring allreduce), then e ← ē
2    each worker  b = x - α·e - β·s: the point that the model's parameters hold while training
3    each worker  H local steps of the user's torch optimizer, from b to y
4    each worker  Δ = e + b - y; send C(Δ); e ← Δ - C(Δ)
5    the server   single-way compression (SC): u = mean of C(Δ) over the workers
5'   the server   double-way compression (DC): D = s + mean of C(Δ); u = C(D); s ← D - u
6    all          x ← x - u

The library differs from the paper in three points: α, between 0 (EF) and 1 (SAEF), is the coefficient of
SA-PEF; β steps ahead by the server's error too; and either every worker runs the whole server, or each
worker runs a part of it.

Row 1 is in :mod:`hvd_saef.round.averaging` and row 3 in :mod:`hvd_saef.round.local_steps`. The other rows
are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hvd_saef.compression import BlockedTensor, Compressor, Draws, Memory


def step_ahead(x: Tensor, e: Tensor, s: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Row 2: returns b = x - α·e - β·s in new memory. `s` is needed only where β > 0."""
    b = x.clone()
    if alpha:
        b.sub_(e if alpha == 1 else e * alpha)  # two operations: a fused one would round differently
    if beta and s is not None:
        b.sub_(s if beta == 1 else s * beta)
    return b


def add_update(e: Tensor, b: Tensor, y: Tensor) -> None:
    """Row 4, first half: writes Δ = e + b - y into e, in place. The memory of `b` is overwritten."""
    e.add_(b.sub_(y))


class PlainRows:
    """Computes rows 4, 5', 6 and 2 around any compressor C, one after the other as in the paper.

    `Compressor.fused` computes the same bits faster.
    """

    narrow = False
    """See :attr:`Fused.narrow`: such parameters are copied before row 4 and after row 2."""

    def __init__(self, compressor: Compressor, draws: Draws | None = None) -> None:
        """Keep `draws`, the random numbers that this worker's compressor may use in this round."""
        self._compressor = compressor
        self._draws = draws or Draws()

    def send(self, memories: Sequence[Memory], payloads: Sequence[Tensor]) -> None:
        """Row 4: computes Δ = e + b - y, writes C(Δ) into `payloads`, and leaves Δ - C(Δ) in e."""
        for memory, payload in zip(memories, payloads, strict=True):
            if memory.parameter_memory:
                b = step_ahead(memory.x, memory.e, memory.s, memory.alpha, memory.beta)
                add_update(memory.e, b, torch.cat(list(memory.parameter_memory)))
            self._compressor.encode(self._blocked(memory.e, memory), payload)

    def serve(
        self, payloads: Sequence[Tensor], weights: Sequence[float], s: BlockedTensor, answer: Tensor
    ) -> None:
        """Row 5': writes u = C(D) into `answer` and leaves D - u in s, where D = s + Σ weight_k·C(Δ_k).

        The sum runs in the order of the workers.
        """
        for payload, weight in zip(payloads, weights, strict=True):
            self._compressor.decode_add(payload, s, weight)
        self._compressor.encode(s, answer)

    def receive(
        self,
        memories: Sequence[Memory],
        sent: Sequence[Tensor],
        payloads: Sequence[Sequence[Tensor]],
        weights: Sequence[float],
    ) -> None:
        """Row 6: subtracts u = Σ weight_k·C(...) from x, in place; then row 2 of the next round.

        The sum runs in the order of the workers. The payloads are the server's one answer, with weight 1, or
        (row 5) those of all workers, with weight 1/K each. Row 2 writes b into the parameter memory, if any.
        """
        for memory, arrived in zip(memories, payloads, strict=True):
            x = self._blocked(memory.x, memory)
            for payload, weight in zip(arrived, weights, strict=True):
                self._compressor.decode_add(payload, x, -weight)
            if memory.parameter_memory:
                b = step_ahead(memory.x, memory.e, memory.s, memory.alpha, memory.beta)
                pieces = list(memory.parameter_memory)
                torch._foreach_copy_(pieces, list(torch.split(b, [piece.numel() for piece in pieces])))

    def _blocked(self, flat: Tensor, memory: Memory) -> BlockedTensor:
        return BlockedTensor(flat, memory.blocks, replace(self._draws, first=memory.first))
