"""A job that saves a checkpoint and goes on, or one that begins where such a checkpoint is.

mpirun -np 2 python -m tests.transport.resumes save FOLDER
torchrun --nproc-per-node 2 -m tests.transport.resumes load FOLDER

At the end, each rank writes what its x and errors are into FOLDER/HOW-RANK.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hvd_saef
from benchmarks.job import job
from tests.transport.checks import backward, small_model

SAVED, LAST = 5, 9
"""Odd, so that a round of two local steps is under way."""


def main(how: str, folder: Path) -> None:
    """Train to the last step, from the first or from the checkpoint."""
    torch.set_num_threads(1)
    job.begin()
    model: nn.Module = small_model(seed=0 if how == "save" else 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer: Any = hvd_saef.DistributedOptimizer(inner, model=model, block_size=4, local_steps=2)
    first = 0
    if how == "load":
        first = hvd_saef.load_checkpoint(folder / "checkpoint", model, optimizer)["step"]
    for step in range(first, LAST):
        backward(model, step)
        optimizer.step()
        if how == "save" and step + 1 == SAVED:
            hvd_saef.save_checkpoint(folder / "checkpoint", model, optimizer, step=SAVED)
    state = optimizer.state_dict()["hvd_saef"]
    bits = b"".join(value.numpy().tobytes() for name in ("x", "errors") for value in state[name].values())
    (folder / f"{how}-{job.rank()}").write_bytes(bits)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
