"""Trains a small model for long, with random periods and pauses, and watches for whatever grows or parts.

mpirun -np 4 python -m tests.mpi.soak [STEPS] [WRAPS]

Every 500 steps the optimizer is wrapped anew with other p and H, ranks pause at random, and x, resident
memory, file descriptors and threads are looked at. Then a wrapper is made and dropped WRAPS times. Rank 0
prints a line of JSON; a difference in x, or growth, fails the job.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import hvd_saef

# isort: split
import horovod.torch as hvd
import torch
from torch import nn

CHANGE = 500


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def standing() -> dict[str, int]:
    """What must not grow."""
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    return {"bytes": resident(), "descriptors": descriptors, "threads": threading.active_count()}


def wrap(model: nn.Module, choice: random.Random) -> Any:
    """A wrapper with settings that all ranks choose alike."""
    return hvd_saef.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        model.named_parameters(),
        choice.choice([hvd_saef.Compression.sign, hvd_saef.Compression.topk(0.05)]),
        model=model,
        averaging_period=choice.choice([None, 2, 5, 16]),
        local_steps=choice.choice([1, 1, 2, 4]),
        bucket_bytes=choice.choice([2000, 1 << 20]),
    )


def same_everywhere(model: nn.Module) -> bool:
    """Whether x has the same bits on all ranks."""
    x = torch.cat([value.reshape(-1) for value in model.state_dict().values()])
    everyone = hvd.allgather(x.view(torch.int32).unsqueeze(0), name="x")
    return bool((everyone == everyone[0]).all()) and bool(x.isfinite().all())


def soak(steps: int, wraps: int) -> dict[str, Any]:
    """What was seen, of this rank."""
    choice, own = random.Random(1), random.Random(hvd.rank())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    seen: list[dict[str, int]] = []
    same = True
    optimizer: Any = None
    for step in range(steps):
        if step % CHANGE == 0:
            if optimizer is not None:
                optimizer.flush()
                same = same and same_everywhere(model)
                seen.append(standing())
            optimizer = wrap(model, choice)
        if own.random() < 0.002:
            time.sleep(own.uniform(0, 0.2))
        optimizer.zero_grad()
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
    optimizer.flush()
    same = same and same_everywhere(model)
    seen.append(standing())
    for number in range(wraps):
        optimizer = wrap(model, choice)
        for _ in range(4):
            model(torch.randn(8, 32)).square().mean().backward()
            optimizer.step()
        optimizer.flush()
        if number == wraps // 4:
            early = standing()
    optimizer = None
    after = standing() if wraps else {}
    warm = seen[len(seen) // 2]
    return {
        "steps": steps,
        "same": same,
        "memory_growth": seen[-1]["bytes"] / warm["bytes"] - 1,
        "descriptors": [seen[0]["descriptors"], seen[-1]["descriptors"]],
        "threads": [warm["threads"], seen[-1]["threads"]],
        "wraps": wraps,
        "memory_growth_of_wraps": after["bytes"] / early["bytes"] - 1 if wraps else 0.0,
    }


def main(steps: int = 20_000, wraps: int = 1_000) -> None:
    """Soak, and say what was seen."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    hvd.init()
    everyone = hvd.allgather_object(soak(steps, wraps), name="report")
    if hvd.rank() == 0:
        worst = max(everyone, key=lambda report: float(report["memory_growth"]))
        print(json.dumps(worst | {"ranks": hvd.size(), "same": all(r["same"] for r in everyone)}), flush=True)
    good = all(
        r["same"]
        and r["memory_growth"] < 0.01
        and r["memory_growth_of_wraps"] < 0.01
        and r["descriptors"][0] == r["descriptors"][1]
        and r["threads"][0] == r["threads"][1]
        for r in everyone
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
