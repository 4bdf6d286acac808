"""A round of one worker's memory by any version of the kernels, on any device: all that it leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_saef import Compressor
from hvd_saef.compression import BlockedTensor, Blocks, Fused, Memory
from hvd_saef.memory import algorithm

CPU = torch.device("cpu")
NARROW = [torch.float32, torch.bfloat16, torch.float16]
NASTY = [0.0, -0.0, 1.0, 1 / 3, -1 / 3, 1e-40, -1e-40, 3e37, -3e37, 1.1754944e-38]
"""Zeros of both signs, ties, denormals, huge numbers."""


@dataclass
class Worker:
    """A worker's memory: parts of one bucket, one after the other, with the parameters' own memory."""

    memories: list[Memory]
    parameters: list[Tensor]

    @classmethod
    def of(
        cls,
        parts: Sequence[Sequence[int]],
        dtypes: Sequence[torch.dtype],
        dtype: torch.dtype,
        device: torch.device = CPU,
        block_size: int | None = 70,
        nasty: bool = False,
        alpha: float = 0.7,
        beta: float = 0.4,
    ) -> Worker:
        """Some state, the same in each call and on each device; the parameters' dtypes take turns."""
        generator = torch.Generator().manual_seed(7)

        def numbers(numel: int, scale: float) -> Tensor:
            drawn = torch.randn(numel, generator=generator, dtype=dtype) / scale
            if nasty:
                drawn[::2] = drawn[::2].mul(3).round().div(3)
                pool = torch.tensor(NASTY, dtype=dtype)
                if torch.float16 in dtypes:  # b must fit
                    pool = pool.clamp(-3e4, 3e4)
                drawn[::7] = pool.repeat(-(-numel // 70))[: len(drawn[::7])]
            return drawn

        memories, parameters = [], []
        for sizes in parts:
            blocks = Blocks.cut(list(sizes), block_size, dtype)
            x, e, s = (numbers(blocks.numel, scale).to(device) for scale in (1, 90, 50))
            y = numbers(blocks.numel, 1)
            pieces = [p.to(dtypes[i % len(dtypes)]).to(device) for i, p in enumerate(y.split(list(sizes)))]
            parameters += pieces
            memories.append(Memory(blocks, x, e, s if beta else None, pieces, alpha, beta))
        return cls(memories, parameters)

    def round(
        self, rows: Fused, compressor: Compressor, weights: Sequence[float], odd: bool = False
    ) -> list[Tensor]:
        """Everything that a round leaves behind, on the CPU. Payloads begin at an `odd` byte, or do not."""
        device = self.memories[0].x.device
        sizes = [compressor.payload_bytes(memory.blocks) for memory in self.memories]
        sent, answers = (
            [torch.empty(size + odd, dtype=torch.uint8, device=device)[odd:] for size in sizes]
            for _ in range(2)
        )
        rows.send(self.memories, sent)
        left = []
        for memory, own, answer in zip(self.memories, sent, answers, strict=True):
            s = torch.sin(torch.arange(memory.blocks.numel)).to(memory.x.dtype).to(device)
            rows.serve([own, own], weights, BlockedTensor(s, memory.blocks), answer)
            left.append(s)
        arrived = [[answer, own] for answer, own in zip(answers, sent, strict=True)]
        rows.receive(self.memories, sent, arrived, weights)
        flats = [flat for memory in self.memories for flat in (memory.x, memory.e)]
        parameters = (parameter.view(-1) for parameter in self.parameters)
        return [one.cpu() for one in (*sent, *answers, *left, *flats, *parameters)]


class Copying(algorithm.PlainRows):
    """PlainRows around copies of the parameters, as a trip makes them where they are of another dtype."""

    def send(self, memories: Sequence[Memory], payloads: Sequence[Tensor]) -> None:
        """See :meth:`Fused.send`."""
        for m, payload in zip(memories, payloads, strict=True):
            b = algorithm.step_ahead(m.x, m.e, m.s, m.alpha, m.beta)
            sizes = [piece.numel() for piece in m.parameter_memory]
            rounded = [
                part.to(piece.dtype).to(b.dtype)
                for part, piece in zip(b.split(sizes), m.parameter_memory, strict=True)
            ]
            y = torch.cat([piece.to(b.dtype) for piece in m.parameter_memory])
            algorithm.add_update(m.e, torch.cat(rounded), y)
            super().send([dataclasses.replace(m, parameter_memory=())], [payload])


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether all bits are equal, the sign of zero and NaNs' bits included. All on the CPU."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
