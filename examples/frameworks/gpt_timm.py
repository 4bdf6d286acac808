"""Trains the GPT of gpt.py with the optimizer, the schedule and the moving average of timm.

    torchrun --nproc-per-node 2 examples/frameworks/gpt_timm.py --checkpoints runs/timm
    torchrun --nproc-per-node 2 examples/frameworks/gpt_timm.py --resume runs/timm/epoch-1

Each line that differs from a usual script with timm's factories has a comment which begins with "Differs:".
Needs timm, which needs the torchvision that belongs to your torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import gpt
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

import hvd_saef


def main(arguments: Sequence[str] | None = None) -> gpt.Outcome:
    """Train, and print the validation loss at x after each epoch on rank 0."""
    args = gpt.arguments_of(__doc__, arguments)
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # Differs: the same parameters on all ranks, which DistributedDataParallel sees to.
    model = gpt.GPT().to(device)
    train_set, validation_set = (rows.rows.to(device) for rows in gpt.text())
    steps_an_epoch = len(train_set) // (gpt.BATCH * gpt.ACCUMULATION * ranks)

    optimizer = create_optimizer_v2(model, "adamw", lr=gpt.RATE, weight_decay=0.1, betas=(0.9, 0.95))
    average = ModelEmaV3(model, decay=0.9)
    # Differs: the optimizer exchanges compressed updates. There is no DistributedDataParallel.
    optimizer = hvd_saef.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), model=model, **gpt.SAEF
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=gpt.EPOCHS - 0.5,
        warmup_epochs=0.5,
        warmup_prefix=True,
        warmup_lr=gpt.RATE / 5,
        min_lr=gpt.RATE / 10,
        step_on_epochs=False,
        updates_per_epoch=steps_an_epoch,
    )
    first = 0
    if args.resume:
        # Differs: all ranks load, as each has errors and momentum of its own.
        saved = hvd_saef.load_checkpoint(args.resume, model, optimizer)
        first = saved["epoch"]
        average.module.load_state_dict(saved["average"])

    losses = []
    model.train()
    for epoch in range(first, gpt.EPOCHS):
        for step in range(steps_an_epoch):
            for part in range(gpt.ACCUMULATION):
                rows = gpt.rows_in_turn(epoch, step * gpt.ACCUMULATION + part, rank, ranks)
                (gpt.loss_of(model, train_set[rows]) / gpt.ACCUMULATION).backward()
            nn.utils.clip_grad_norm_(model.parameters(), gpt.CLIP)  # Differs: this is this rank's own norm.
            optimizer.step()
            optimizer.zero_grad()
            # Nothing differs: the moving average reads model.state_dict(), which is at x.
            average.update(model)
            scheduler.step_update(epoch * steps_an_epoch + step + 1)
        losses.append(gpt.evaluate(model, gpt.loss_of, validation_set))
        averaged = gpt.evaluate(average.module, gpt.loss_of, validation_set)
        if rank == 0:
            print(
                f"epoch {epoch + 1}: validation loss {losses[-1]:.4f}, of the moving average {averaged:.4f}",
                flush=True,
            )
        if args.checkpoints:
            # Differs: all ranks save, not rank 0 alone.
            hvd_saef.save_checkpoint(
                args.checkpoints / f"epoch-{epoch + 1}",
                model,
                optimizer,
                epoch=epoch + 1,
                average=average.module.state_dict(),
            )
    return gpt.Outcome(losses, gpt.hash_of(model), gpt.hash_of(average.module))


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
