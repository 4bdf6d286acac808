"""Trains the GPT of gpt.py with Hugging Face accelerate.

    torchrun --nproc-per-node 2 examples/frameworks/gpt_accelerate.py --checkpoints runs/accelerate
    torchrun --nproc-per-node 2 examples/frameworks/gpt_accelerate.py --resume runs/accelerate/epoch-1

Each line that differs from a usual accelerate script has a comment which begins with "Differs:".
`accelerate launch` starts the script as well as torchrun does. Needs the extra [frameworks].
"""

from __future__ import annotations

from collections.abc import Sequence

import gpt
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import hvd_saef


def main(arguments: Sequence[str] | None = None) -> gpt.Outcome:
    """Train, and print the validation loss at x after each epoch on rank 0."""
    args = gpt.arguments_of(__doc__, arguments)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=gpt.ACCUMULATION)
    torch.manual_seed(0)  # Differs: the same parameters on all ranks, which DistributedDataParallel sees to.
    # Differs: prepare(model) would put DistributedDataParallel around the model, which averages gradients.
    # In evaluation mode accelerate does only the rest: device, mixed precision, compilation.
    model = accelerator.prepare_model(gpt.GPT(), evaluation_mode=True)
    optimizer = torch.optim.AdamW(gpt.groups(model), lr=gpt.RATE, betas=(0.9, 0.95))
    # Differs: the optimizer exchanges compressed updates. It is wrapped before accelerate prepares it.
    saef = hvd_saef.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), model=model, **gpt.SAEF
    )
    # Nothing differs: a prepared loader gives each rank its part of the rows, and all ranks equally many.
    optimizer, loader, validation_loader = accelerator.prepare(
        saef, *(DataLoader(rows, gpt.BATCH) for rows in gpt.text())
    )
    # Nothing differs: accelerate steps a prepared schedule once for each process. This one counts steps.
    schedule = torch.optim.lr_scheduler.LambdaLR(saef, gpt.schedule)
    accelerator.register_for_checkpointing(schedule)
    first = 0
    if args.resume:
        accelerator.load_state(args.resume)
        # Differs: accelerate has loaded rank 0's optimizer on all ranks. Each takes its own instead.
        first = hvd_saef.load_checkpoint(args.resume / "hvd_saef", model, saef)["epoch"]

    losses = []
    model.train()
    for epoch in range(first, gpt.EPOCHS):
        for rows in loader:
            with accelerator.accumulate(model):
                accelerator.backward(gpt.loss_of(model, rows))
                if accelerator.sync_gradients:
                    # Differs: this is the norm of this rank's gradient.
                    accelerator.clip_grad_norm_(model.parameters(), gpt.CLIP)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                schedule.step()

        model.eval()  # Nothing differs: the model was given as model=, and in eval mode computes at x.
        with torch.no_grad():
            parts = [gpt.loss_of(model, rows).repeat(len(rows)) for rows in validation_loader]
        losses.append(float(accelerator.gather_for_metrics(torch.cat(parts)).mean()))
        model.train()
        accelerator.print(f"epoch {epoch + 1}: validation loss {losses[-1]:.4f}")
        if args.checkpoints:
            folder = args.checkpoints / f"epoch-{epoch + 1}"
            accelerator.save_state(folder)
            # Differs: accelerate saves rank 0's optimizer. Each rank has errors and momentum of its own.
            hvd_saef.save_checkpoint(folder / "hvd_saef", model, saef, epoch=epoch + 1)
    return gpt.Outcome(losses, gpt.hash_of(model))


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
