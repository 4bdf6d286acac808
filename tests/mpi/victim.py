"""A job that trains while a fault happens to one of its ranks.

mpirun -np 4 python -m tests.mpi.victim FAULT FOLDER [STEPS]

The last rank has the fault at step FAULT_STEP, and writes the time into FOLDER/fault just before. Ranks that
come to the end write what x was into FOLDER/end-RANK.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hvd_saef

# isort: split
import horovod.torch as hvd
import torch
from torch import nn

FAULT_STEP = 3
STEPS = 6


def pause() -> None:
    """SIGSTOP, and SIGCONT three seconds later."""
    os.system(f"(sleep 3; kill -CONT {os.getpid()}) &")
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    """An exception between two steps."""
    raise OSError("this rank's disk is gone")


FAULTS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "sigkill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "sigstop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(600),
    "pause": pause,
    "exception": fail,
    "early-end": lambda: sys.exit(0),
    "cut": lambda: time.sleep(1),  # whoever started the job cuts the link meanwhile
}
"""What can happen to the last rank, by name."""


def main(fault: str, folder: Path, steps: int = STEPS) -> None:
    """Train, with the fault on the last rank."""
    hvd.init()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    victim = hvd.rank() == hvd.size() - 1
    if fault == "never-wraps" and victim:
        (folder / "fault").write_text(str(time.time()))
        time.sleep(600)
    optimizer = hvd_saef.DistributedOptimizer(
        inner, model.named_parameters(), model=model, averaging_period=2, bucket_bytes=2000
    )
    generator = torch.Generator().manual_seed(hvd.rank())
    for step in range(steps):
        if victim and step == FAULT_STEP:
            (folder / "fault").write_text(str(time.time()))
            FAULTS[fault]()
        optimizer.zero_grad()
        model(torch.randn(8, 20, generator=generator)).square().sum().backward()
        optimizer.step()
    x = torch.cat([value.reshape(-1) for value in model.state_dict().values()])
    (folder / f"end-{hvd.rank()}").write_bytes(x.numpy().tobytes())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
