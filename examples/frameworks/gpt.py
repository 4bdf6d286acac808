"""Trains a small GPT in a loop like nanoGPT's, without a framework.

    torchrun --nproc-per-node 2 examples/frameworks/gpt.py
    torchrun --nproc-per-node 2 examples/frameworks/gpt.py --checkpoints runs/gpt
    torchrun --nproc-per-node 2 examples/frameworks/gpt.py --resume runs/gpt/epoch-1

The loop accumulates gradients, clips them, sets the learning rate by hand, evaluates, and saves. Each line
that differs from a loop over DistributedDataParallel has a comment which begins with "Differs:".
The other scripts in this folder train on the same data with a framework.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hvd_saef

EPOCHS = 2
ACCUMULATION = 2
"""Backward passes whose gradients add up before a step."""
BATCH = 4
"""Rows of a rank in one forward pass."""
RATE = 5e-3
CLIP = 1.0
"""The limit for the norm of a rank's own gradient."""
SAEF: dict[str, Any] = {"server_step_ahead": 1.0, "dense_below": 1024}
"""Settings of hvd_saef: β = 1 suits Adam, and biases and norms travel uncompressed."""


class Text(torch.utils.data.Dataset[Tensor]):
    """Rows of bytes from the source code of Python's standard library, [rows, 33], in an order of its own."""

    def __init__(self, first: int, rows: int) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20]
        data = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
        order = torch.randperm(len(data) // 33, generator=torch.Generator().manual_seed(0))
        self.rows = data[: len(data) // 33 * 33].view(-1, 33)[order[first : first + rows]].long()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def text() -> tuple[Text, Text]:
    """The rows to train on, and those to evaluate on."""
    return Text(0, 128), Text(128, 32)


class Block(nn.Module):
    """Attention and a perceptron, each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_heads, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, bytes, width] to the same shape."""
        parts = self.to_heads(self.norm(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        queries, keys, values = parts.unbind(2)
        attended = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.from_heads(attended.transpose(1, 2).flatten(2))
        return x + torch.as_tensor(self.perceptron(self.norm_2(x)))


class GPT(nn.Module):
    """A small GPT over bytes. The embedding and the last layer share their weight, as in GPT-2."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(32, width)
        self.blocks = nn.Sequential(*(Block(width, heads=2) for _ in range(layers)), nn.LayerNorm(width))
        self.scores = nn.Linear(width, 256, bias=False)
        for embedding in (self.bytes, self.places):
            nn.init.normal_(embedding.weight, std=0.02)
        self.scores.weight = self.bytes.weight

    def forward(self, seen: Tensor) -> Tensor:
        """[batch, bytes] to the scores of each next byte, [batch, bytes, 256]."""
        places = torch.arange(seen.shape[1], device=seen.device)
        scores: Tensor = self.scores(self.blocks(self.bytes(seen) + self.places(places)))
        return scores


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """The mean cross entropy of each next byte."""
    return nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: weight decay is for matrices alone."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def schedule(step: int, warm: int = 4, steps: int = 16) -> float:
    """The part of RATE that `step` takes, counted from 0: a linear warm-up, then half a cosine to a tenth."""
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1, (step - warm) / (steps - warm))))


class Outcome(NamedTuple):
    """What a run came to, the same on all ranks."""

    losses: list[float]
    """The validation loss at x after each epoch."""
    x: str
    """A hash of the model's state at x."""
    average: str = ""
    """A hash of the moving average of x, where the run keeps one."""


def hash_of(model: nn.Module) -> str:
    """A hash of the model's state at x, without the names, which frameworks change."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def arguments_of(about: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command line, which are the same for each script here."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, help="folder to save into after each epoch")
    parser.add_argument("--resume", type=Path, help="what was saved there after an epoch")
    return parser.parse_args(arguments)


def rows_in_turn(epoch: int, batch: int, rank: int, ranks: int) -> range:
    """The rows of a rank's batch of that number within any epoch: ranks take whole batches in turn."""
    first = (batch * ranks + rank) * BATCH
    return range(first, first + BATCH)


@torch.no_grad()
def evaluate(model: nn.Module, loss_of: Callable[[Any, Tensor], Tensor], rows: Tensor) -> float:
    """The mean loss on all rows, of which each rank takes its part. Collective."""
    model.eval()  # Nothing differs: the model was given as model=, and in eval mode computes at x.
    mine = rows.split(BATCH)[dist.get_rank() :: dist.get_world_size()]
    loss = torch.stack([loss_of(model, batch) for batch in mine]).mean()
    model.train()
    dist.all_reduce(loss)
    return float(loss / dist.get_world_size())


def train(
    args: argparse.Namespace,
    model: nn.Module,
    loss_of: Callable[[Any, Tensor], Tensor] = loss_of,
    rows_of: Callable[[int, int, int, int], Sequence[int]] = rows_in_turn,
) -> Outcome:
    """Trains, and prints the validation loss at x after each epoch on rank 0. Collective."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = next(model.parameters()).device
    train_set, validation_set = (rows.rows.to(device) for rows in text())
    steps_an_epoch = len(train_set) // (BATCH * ACCUMULATION * ranks)
    # Differs: there is no DistributedDataParallel(model), which would average the gradients. For the same
    # reason there is no require_backward_grad_sync to set while gradients accumulate.
    optimizer = torch.optim.AdamW(groups(model), lr=RATE, betas=(0.9, 0.95))
    # Differs: the optimizer exchanges compressed updates.
    optimizer = hvd_saef.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), model=model, **SAEF
    )
    first = 0
    if args.resume:
        # Differs: all ranks load, as each has errors and momentum of its own.
        first = hvd_saef.load_checkpoint(args.resume, model, optimizer)["epoch"]

    losses = []
    model.train()
    for epoch in range(first, EPOCHS):
        for step in range(steps_an_epoch):
            for group in optimizer.param_groups:
                group["lr"] = RATE * schedule(epoch * steps_an_epoch + step)
            for part in range(ACCUMULATION):
                rows = train_set[rows_of(epoch, step * ACCUMULATION + part, rank, ranks)]
                (loss_of(model, rows) / ACCUMULATION).backward()
            # Differs: this is the norm of this rank's own gradient.
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(evaluate(model, loss_of, validation_set))
        if rank == 0:
            print(f"epoch {epoch + 1}: validation loss {losses[-1]:.4f}", flush=True)
        if args.checkpoints:
            # Differs: all ranks save, not rank 0 alone.
            hvd_saef.save_checkpoint(
                args.checkpoints / f"epoch-{epoch + 1}", model, optimizer, epoch=epoch + 1
            )
    return Outcome(losses, hash_of(model))


def main(arguments: Sequence[str] | None = None) -> Outcome:
    """Train a GPT."""
    args = arguments_of(__doc__, arguments)
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)  # the same parameters on all ranks, which DistributedDataParallel would see to
    return train(args, GPT().to(device))


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
