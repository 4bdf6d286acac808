"""A job that trains while a fault happens to one of its ranks.

mpirun -np 4 python -m tests.transport.victim FAULT FOLDER [STEPS]

The last rank, or the one that VICTIM names in the environment, has the fault at step FAULT_STEP, and writes
the time into FOLDER/fault just before. Until then ranks wait for each other without a limit, so that a slow
machine makes none of them late; from then on HVD_SAEF_STALL_WARNING_S and HVD_SAEF_STALL_ABORT_S hold. Ranks
that come to the end write what x was into FOLDER/end-RANK.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hvd_saef
from benchmarks.job import job
from hvd_saef.transport.watch import Patience
from tests.without import LIMIT

FAULT_STEP = 3
STEPS = 6


def pause(folder: Path) -> None:
    """SIGSTOP, and SIGCONT once another rank has warned of it."""
    os.system(f"(while [ ! -e '{folder}/warned' ]; do sleep 0.05; done; kill -CONT {os.getpid()}) &")
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    """An exception between two steps."""
    raise OSError("this rank's disk is gone")


FAULTS: dict[str, Callable[[Path], Any]] = {
    "none": lambda _: None,
    "sigkill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "sigstop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda _: time.sleep(2 * LIMIT),
    "pause": pause,
    "exception": lambda _: fail(),
    "early-end": lambda _: sys.exit(0),
    "cut": lambda _: None,  # whoever started the job has cut the link
}
"""What can happen to a rank, by name."""


def patient() -> dict[str, str]:
    """No limits for now: takes away from the environment those that were set, and returns them."""
    names = ("HVD_SAEF_STALL_WARNING_S", "HVD_SAEF_STALL_ABORT_S")
    limits = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ["HVD_SAEF_STALL_WARNING_S"] = "0"
    return limits


def be_impatient(optimizer: Any, limits: dict[str, str]) -> None:
    """These limits hold from here on."""
    del os.environ["HVD_SAEF_STALL_WARNING_S"]
    os.environ.update(limits)
    optimizer._saef.communicator._watch._patience = Patience.of_environment()


def tell_of_warnings(folder: Path) -> None:
    """Write FOLDER/warned when this process warns of a rank that did not arrive."""
    show = warnings.showwarning

    def tell(message: Warning | str, *rest: Any, **more: Any) -> None:
        show(message, *rest, **more)
        if "did not arrive" in str(message):
            (folder / "warned").touch()

    warnings.showwarning = tell


def main(fault: str, folder: Path, steps: int = STEPS) -> None:
    """Train, with the fault on one rank."""
    limits = patient() if fault != "never-wraps" else {}
    tell_of_warnings(folder)
    job.begin()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    victim = job.rank() == int(os.environ.get("VICTIM", job.size() - 1))
    job.barrier()
    if fault == "never-wraps" and victim:
        (folder / "fault").write_text(str(time.time()))
        time.sleep(2 * LIMIT)
    optimizer = hvd_saef.DistributedOptimizer(
        inner, model.named_parameters(), model=model, averaging_period=2, bucket_bytes=2000
    )
    generator = torch.Generator().manual_seed(job.rank())
    for step in range(steps):
        if step == FAULT_STEP and fault != "never-wraps":
            job.barrier()
            if victim:
                (folder / "fault").write_text(str(time.time()))
            while fault == "cut" and not (folder / "cut").exists():
                time.sleep(0.01)
            be_impatient(optimizer, limits)
            if victim:
                FAULTS[fault](folder)
        optimizer.zero_grad()
        model(torch.randn(8, 20, generator=generator)).square().sum().backward()
        optimizer.step()
    x = torch.cat([value.reshape(-1) for value in model.state_dict().values()])
    (folder / f"end-{job.rank()}").write_bytes(x.numpy().tobytes())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
