"""Trains the GPT of gpt.py with PyTorch Lightning.

    torchrun --nproc-per-node 2 examples/frameworks/gpt_lightning.py --checkpoints runs/lightning
    torchrun --nproc-per-node 2 examples/frameworks/gpt_lightning.py --resume runs/lightning/epoch-0.ckpt

Each line that differs from a usual Lightning script has a comment which begins with "Differs:".
Needs the extra [frameworks].
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import gpt
import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

import hvd_saef


class EachRanksOwn(DDPStrategy):  # type: ignore[misc]
    """Lightning's processes, samplers and logging, without DistributedDataParallel around the module.

    Beside each file of Lightning's it keeps a folder with every rank's errors and momentum: Lightning saves
    rank 0's alone.
    """

    resume: str = ""

    def configure_ddp(self) -> None:
        """Leaves the module as it is: DistributedDataParallel would average the gradients."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Saves Lightning's file, then the folder. Collective."""
        super().save_checkpoint(checkpoint, filepath, storage_options)
        hvd_saef.save_checkpoint(f"{filepath}.hvd_saef", self.lightning_module, self.optimizers[0])

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads Lightning's file, and notes where the folder is."""
        self.resume = f"{checkpoint_path}.hvd_saef"
        loaded: dict[str, Any] = super().load_checkpoint(checkpoint_path, weights_only)
        return loaded

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads each rank's own state from the folder. Collective."""
        hvd_saef.load_checkpoint(self.resume, self.lightning_module, self.optimizers[0])

    def remove_checkpoint(self, filepath: Any) -> None:
        """Removes Lightning's file and the folder, where save_top_k says so."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            shutil.rmtree(f"{filepath}.hvd_saef", ignore_errors=True)


class Module(lightning.LightningModule):  # type: ignore[misc]
    """The GPT, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt.GPT()
        self.losses: list[float] = []

    def training_step(self, rows: Tensor, index: int) -> Tensor:
        """The loss of a batch."""
        return gpt.loss_of(self.model, rows)

    def validation_step(self, rows: Tensor, index: int) -> None:
        """Logs the loss at x."""
        self.log("validation loss", gpt.loss_of(self.model, rows), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Keeps the losses, and prints them on rank 0."""
        self.losses.append(float(self.trainer.callback_metrics["validation loss"]))
        self.print(f"epoch {self.current_epoch + 1}: validation loss {self.losses[-1]:.4f}")

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and its schedule, which Lightning steps after each step of the optimizer."""
        optimizer = torch.optim.AdamW(gpt.groups(self.model), lr=gpt.RATE, betas=(0.9, 0.95))
        # Differs: the optimizer exchanges compressed updates. model= is the module that the steps above call.
        # Lightning does not call the LightningModule itself.
        optimizer = hvd_saef.DistributedOptimizer(
            optimizer, named_parameters=self.named_parameters(), model=self.model, **gpt.SAEF
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, gpt.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(arguments: Sequence[str] | None = None) -> gpt.Outcome:
    """Train, and print the validation loss at x after each epoch on rank 0."""
    args = gpt.arguments_of(__doc__, arguments)
    torch.set_num_threads(1)
    files = ModelCheckpoint(args.checkpoints, "epoch-{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    trainer = lightning.Trainer(
        strategy=EachRanksOwn(),  # Differs: see there. Usual is "ddp".
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"]),
        max_epochs=gpt.EPOCHS,
        accumulate_grad_batches=gpt.ACCUMULATION,
        gradient_clip_val=gpt.CLIP,  # Differs: this limits the norm of each rank's own gradient.
        callbacks=[files] if args.checkpoints else [],
        enable_checkpointing=bool(args.checkpoints),
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)  # Differs: the same parameters on all ranks, which DistributedDataParallel sees to.
    module = Module()
    # Nothing differs: Lightning gives each rank its part of the rows, and all ranks equally many.
    loaders = [DataLoader(rows, gpt.BATCH) for rows in gpt.text()]
    trainer.fit(module, *loaders, ckpt_path=str(args.resume) if args.resume else None)
    return gpt.Outcome(module.losses, gpt.hash_of(module))


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
