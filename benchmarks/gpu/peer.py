"""The operations of DeepSpeed's 1-bit Adam for one exchange, as a peer on the same device.

Written anew from the description (Tang et al., "1-bit Adam", ICML 2021, and DeepSpeed's tutorial): error
feedback both ways, one scale for the whole buffer, signs packed into bytes, worker j the server of part j.
What is timed is the chain of torch operations. Packing bits is a call of its own there; its time is given
apart, so that the chain without it bounds DeepSpeed's from below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.clock import Work


class OneBit:
    """The memory of one worker of some, and its part of an exchange."""

    def __init__(self, numel: int, workers: int, device: torch.device) -> None:
        numel = -(-numel // (8 * workers)) * 8 * workers  # padded, as there
        generator = torch.Generator(device).manual_seed(0)
        self.workers = workers
        self.buffer = torch.randn(numel, generator=generator, device=device)
        self.error = torch.zeros_like(self.buffer)
        self.server_error = torch.zeros(numel // workers, device=device)
        self.places = (1 << torch.arange(8, device=device)).to(torch.uint8)
        self.bits = self.buffer >= 0
        self.packed = self.pack(self.bits)
        self.scales = torch.ones(workers, 1, device=device)

    def pack(self, bits: Tensor) -> Tensor:
        """Eight in a byte."""
        return (bits.view(-1, 8) * self.places).sum(1, dtype=torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse."""
        signs: Tensor = (packed[:, None] & self.places).ne(0).view(-1)
        return signs

    def send(self) -> Tensor:
        """The worker's side: the buffer and its error become signs and a scale."""
        self.buffer.add_(self.error)
        scale: Tensor = self.buffer.norm() / math.sqrt(self.buffer.numel())
        self.bits = self.buffer.sign().add_(1).bool()
        self.error.copy_(self.buffer - scale * self.bits.float().add_(-0.5).mul_(2.0))
        return scale

    def serve(self) -> Tensor:
        """The server's side for one part, of which all workers have sent their signs."""
        signs = self.bits.view(self.workers, -1).float().add_(-0.5).mul_(2.0)
        mean = signs.mul_(self.scales / self.workers).sum(0)
        mean.add_(self.server_error)
        scale: Tensor = mean.norm() / math.sqrt(mean.numel())
        signs = mean.sign().add_(1).bool().float().add_(-0.5).mul_(2.0)
        self.server_error.copy_(mean - scale * signs)
        return scale

    def receive(self) -> None:
        """The workers' side again: all parts of the answer go into the buffer."""
        signs = self.bits.view(self.workers, -1).float().add_(-0.5).mul_(2.0)
        self.buffer.copy_(signs.mul_(self.scales).view(-1))

    def works(self) -> Iterator[tuple[str, Work]]:
        """What is timed."""
        yield "1-bit chain send", self.send
        yield "1-bit chain serve", self.serve
        yield "1-bit chain receive", self.receive
        yield "packing all signs", lambda: self.pack(self.bits)
        yield "unpacking all signs", lambda: self.unpack(self.packed)
