"""Trains a small Llama with Hugging Face's Trainer.

    torchrun --nproc-per-node 2 examples/frameworks/gpt_trainer.py --checkpoints runs/trainer
    torchrun --nproc-per-node 2 examples/frameworks/gpt_trainer.py --resume runs/trainer/checkpoint-8

Each line that differs from a usual Trainer script has a comment which begins with "Differs:".
Needs the extra [frameworks]. The model is one of transformers' own. It is made from a configuration, so
nothing is downloaded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpt
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hvd_saef


def llama() -> LlamaForCausalLM:
    """A Llama over bytes, of about the size of gpt.GPT."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


class EachRanksOwn(TrainerCallback):  # type: ignore[misc]
    """Saves and loads every rank's errors and momentum. Trainer saves those of rank 0 alone."""

    def __init__(self, optimizer: Any, resume: Path | None) -> None:
        self.optimizer, self.resume = optimizer, resume

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Saves into Trainer's own folder, so that save_total_limit counts and deletes it too. Collective."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "hvd_saef"
        hvd_saef.save_checkpoint(folder, others["model"], self.optimizer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Puts each rank's own state in the place of rank 0's, which Trainer has loaded. Collective."""
        if self.resume:
            hvd_saef.load_checkpoint(self.resume / "hvd_saef", others["model"], self.optimizer)


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    """A batch as the model takes it, which shifts the labels itself."""
    return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}


def main(arguments: Sequence[str] | None = None) -> gpt.Outcome:
    """Train, and print the validation loss at x after each epoch on rank 0."""
    args = gpt.arguments_of(__doc__, arguments)
    torch.set_num_threads(1)
    options = TrainingArguments(
        output_dir=str(args.checkpoints or tempfile.gettempdir()),
        num_train_epochs=gpt.EPOCHS,
        per_device_train_batch_size=gpt.BATCH,
        per_device_eval_batch_size=gpt.BATCH,
        gradient_accumulation_steps=gpt.ACCUMULATION,
        max_grad_norm=gpt.CLIP,  # Differs: this limits the norm of each rank's own gradient.
        train_sampling_strategy="sequential",  # Nothing differs: the rows are in a random order already.
        eval_strategy="epoch",
        save_strategy="epoch" if args.checkpoints else "no",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    torch.manual_seed(0)  # Differs: the same parameters on all ranks, which DistributedDataParallel sees to.
    model = llama().to(options.device)
    optimizer = torch.optim.AdamW(gpt.groups(model), lr=gpt.RATE, betas=(0.9, 0.95))
    # Differs: the optimizer is made here, and not by Trainer, to exchange compressed updates.
    saef = hvd_saef.DistributedOptimizer(
        optimizer, named_parameters=model.named_parameters(), model=model, **gpt.SAEF
    )
    train_set, validation_set = gpt.text()
    trainer = Trainer(
        model=model,
        args=options,
        data_collator=collate,
        train_dataset=train_set,
        eval_dataset=validation_set,
        optimizers=(saef, torch.optim.lr_scheduler.LambdaLR(saef, gpt.schedule)),
        callbacks=[EachRanksOwn(saef, args.resume)],  # Differs: see there.
    )
    # Differs: train() would put DistributedDataParallel around the model, which averages gradients. It leaves
    # a model that is prepared already as it is.
    trainer.accelerator.prepare_model(model, evaluation_mode=True)
    trainer.train(resume_from_checkpoint=str(args.resume) if args.resume else None)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return gpt.Outcome(losses, gpt.hash_of(model))


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
