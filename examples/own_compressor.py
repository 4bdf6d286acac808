"""A compressor of one's own: 8 bits an element, each block scaled by its largest magnitude.

    mpirun -np 2 python examples/own_compressor.py
    python examples/own_compressor.py                # one process, which sends nothing: to debug it

What it takes: the size of a payload, known beforehand; `encode`, which writes the payload and leaves behind
what the payload does not say; `decode_add`. Error feedback, step-ahead, both servers and checkpoints are then
around it as they are around the built-in ones. `encode` must depend on nothing but its input.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import horovod.torch as hvd
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef.compression import BlockedTensor, Blocks


@dataclass(frozen=True)  # its fields are what all workers must agree on
class EightBits(hvd_saef.Compressor):
    """Payload: one scale a block in x's dtype, then a signed byte an element."""

    levels: int = 127

    def payload_bytes(self, layout: Blocks) -> int:
        """A number of x's dtype a block, and a byte an element."""
        return layout.count * layout.dtype.itemsize + layout.numel

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """Write C(delta) into `payload`, and leave delta - C(delta) in `delta`."""
        scales, octets = self._parts(payload, delta.blocks)
        first = 0
        for run, rows in delta.rows():  # a run is blocks of one size: a row each
            scale = rows.abs().amax(dim=1) / self.levels
            levels = (rows / scale.clamp_min(torch.finfo(rows.dtype).tiny).unsqueeze(1)).round()
            scales[first : first + run.count] = scale
            octets[run.start : run.stop] = levels.to(torch.int8).view(-1)
            rows.sub_(levels * scale.unsqueeze(1))
            first += run.count
        payload[: scales.nbytes].copy_(scales.view(torch.uint8))

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """Add weight · C(delta) to `out`."""
        scales, octets = self._parts(payload, out.blocks)
        first = 0
        for run, rows in out.rows():
            levels = octets[run.start : run.stop].view(rows.shape).to(rows.dtype)
            rows.add_(levels * scales[first : first + run.count].unsqueeze(1) * weight)
            first += run.count

    @staticmethod
    def _parts(payload: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """A copy of the scales (payloads need not be aligned), and a view of the elements' bytes."""
        head = blocks.count * blocks.dtype.itemsize
        return payload[:head].clone().view(blocks.dtype), payload[head:].view(torch.int8)


def main() -> None:
    """Train on a made-up regression problem, and print the loss on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    args = parser.parse_args()

    hvd.init()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    truth = nn.Linear(20, 5)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = hvd_saef.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), model=model, compression=EightBits()
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    own = torch.Generator().manual_seed(1 + hvd.rank())  # each rank has its own data
    for step in range(1, args.steps + 1):
        model.train()
        inputs = torch.randn(32, 20, generator=own)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), truth(inputs).detach()).backward()
        optimizer.step()
        if step % max(1, args.steps // 4) == 0:
            model.eval()
            with torch.no_grad():
                inputs = torch.randn(256, 20, generator=torch.Generator().manual_seed(0))
                loss = nn.functional.mse_loss(model(inputs), truth(inputs)).item()
            ratio = optimizer.stats()["compression_ratio"]
            if hvd.rank() == 0:
                print(f"step {step}: loss {loss:.4f}, sent 1/{ratio:.1f} of float32", flush=True)


if __name__ == "__main__":
    main()
