"""Trains a small decoder with AdamW on the source code of Python's standard library.

    mpirun -np 4 python examples/transformer.py
    mpirun -np 4 python examples/transformer.py --local-steps 4      # an exchange every fourth step

What differs from a loop over plain Horovod: β = 1 (`server_step_ahead`), which suits Adam and its kind; norms
and biases travel as they are (`dense_below`), and the first 10 rounds are not compressed; the learning rate
is √K times the one of full precision (docs/adam.md says why). Each rank clips its own gradients.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from pathlib import Path

import horovod.torch as hvd
import torch
from torch import Tensor, nn

import hvd_saef

CONTEXT = 64
"""Bytes that the model sees."""


def text() -> Tensor:
    """Some of the standard library's files, as bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


class Decoder(nn.Module):
    """A causal transformer over bytes."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.scores = nn.Linear(width, 256)

    def forward(self, seen: Tensor) -> Tensor:
        """[batch, bytes] to the scores of each next byte, [batch, bytes, 256]."""
        mask = nn.Transformer.generate_square_subsequent_mask(seen.shape[1])
        here = self.bytes(seen) + self.places[: seen.shape[1]]
        scores: Tensor = self.scores(self.layers(here, mask=mask, is_causal=True))
        return scores


def loss_on(model: nn.Module, lines: Tensor) -> Tensor:
    """The mean cross entropy of each next byte."""
    lines = lines.long()
    return nn.functional.cross_entropy(model(lines[:, :-1]).flatten(0, 1), lines[:, 1:].flatten())


def main() -> None:
    """Train, and print the validation loss at x on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="lines a step and rank")
    parser.add_argument("--width", type=int, default=64, help="of the model")
    parser.add_argument("--lr", type=float, default=2e-3, help="for full precision; √K times that is taken")
    parser.add_argument("--local-steps", type=int, default=1, help="steps between two exchanges")
    args = parser.parse_args()

    hvd.init()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    everything = text()
    train_text, validation_text = (
        everything[: len(everything) * 9 // 10],
        everything[len(everything) * 9 // 10 :],
    )
    model = Decoder(args.width, layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr * math.sqrt(hvd.size()), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    optimizer = hvd_saef.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        model=model,
        server_step_ahead=1.0,
        dense_below=1024,
        warmup_steps=10,
        local_steps=args.local_steps,
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)

    def lines(of: Tensor, generator: torch.Generator, number: int) -> Tensor:
        starts = torch.randint(len(of) - CONTEXT - 1, (number,), generator=generator)
        return torch.stack([of[start : start + CONTEXT + 1] for start in starts.tolist()])

    generator = torch.Generator().manual_seed(hvd.rank())
    for step in range(1, args.steps + 1):
        model.train()
        optimizer.zero_grad()
        loss_on(model, lines(train_text, generator, args.batch)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, args.steps // 4) == 0:
            optimizer.flush()  # with local steps: completes the round, so that x has everything
            model.eval()
            with torch.no_grad():
                same = torch.Generator().manual_seed(7)
                loss = loss_on(model, lines(validation_text, same, 64)).item()
            if hvd.rank() == 0:
                print(f"step {step}: validation loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
