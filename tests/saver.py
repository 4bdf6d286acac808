"""Jobs that save without end and are killed while they do: the last complete checkpoint always loads.

python -m tests.saver KILLS                   # two workers as threads of a process; prints a line of JSON
mpirun -np K python -m tests.saver --job DIR  # what is killed in :func:`kill_jobs`, rank by rank
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hvd_saef
from hvd_saef.checkpoints.manifest import MANIFEST
from tests import without
from tests.mpi.launch import ENVIRONMENT, LIMIT, MPIRUN, ROOT
from tests.workers import draw


def digest(model: nn.Module) -> str:
    """A hash of x."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def make(rank: int) -> tuple[nn.Module, Any]:
    """A model of 260,000 parameters, whose files take some moments to write."""
    model = nn.Sequential(nn.Linear(512, 500), nn.Linear(500, 4))
    draw(model, 0)
    inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return model, hvd_saef.DistributedOptimizer(inner, model.named_parameters(), model=model)


def load(folder: Path, model: nn.Module, optimizer: Any) -> int:
    """The rounds of the checkpoint that is there, found to hold what was saved; 0 without one."""
    if not (folder / MANIFEST).exists():
        return 0
    rounds = rounds_in(folder)
    extra = hvd_saef.load_checkpoint(folder, model, optimizer)
    if (extra["rounds"], extra["digest"]) != (rounds, digest(model)):
        raise LookupError(f"{rounds} rounds were saved, and {extra['rounds']} loaded, or others")
    return rounds


def rounds_in(folder: Path) -> int:
    """What the manifest says; 0 without one."""
    with contextlib.suppress(FileNotFoundError):
        rounds: int = json.loads((folder / MANIFEST).read_text())["rounds"]
        return rounds
    return 0


def save_for_ever(folder: Path, rank: int) -> None:
    """Load what is there, then train and save."""
    torch.set_num_threads(1)
    model, optimizer = make(rank)
    load(folder, model, optimizer)
    while True:
        for p in model.parameters():
            p.grad = torch.randn(p.shape)
        optimizer.step()
        rounds = int(optimizer.stats()["rounds"])
        hvd_saef.save_checkpoint(folder, model, optimizer, rounds=rounds, digest=digest(model))


def forked(do: Any) -> int:
    """A process that does it; its exit code says whether it went well."""
    if (pid := os.fork()) == 0:
        try:
            do()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def wait_for_saves(folder: Path, more: int, saver: int) -> None:
    """Until the process `saver` has saved so many rounds more, and a random moment on."""
    wanted, deadline = rounds_in(folder) + more, time.monotonic() + without.patience()
    while rounds_in(folder) < wanted:
        ended = os.waitid(os.P_PID, saver, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if ended or time.monotonic() > deadline:
            raise TimeoutError(f"{folder}: nothing is saved")
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.05))


def kill_threads(kills: int) -> dict[str, int]:
    """Kill a process of two workers that save, and load what is there, so many times."""
    counts = {"kills": kills, "loaded": 0, "left behind": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(kills):
            before = rounds_in(folder)
            pid = forked(lambda: hvd_saef.run_workers(2, lambda rank: save_for_ever(folder, rank)))
            wait_for_saves(folder, random.randint(1, 3), pid)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            complete = {file["name"] for file in json.loads((folder / MANIFEST).read_text())["files"]}
            counts["left behind"] += len({path.name for path in folder.iterdir()} - complete - {MANIFEST})
            loader = forked(lambda: hvd_saef.run_workers(2, lambda rank: load(folder, *make(rank))))
            if os.waitpid(loader, 0)[1] == 0 and rounds_in(folder) > before:
                counts["loaded"] += 1
    return counts


def kill_jobs(kills: int, ranks: int, folder: Path) -> int:
    """Kill one rank of a job that saves, so many times; how often the next job could load what was there."""
    command = [MPIRUN, "-np", str(ranks), sys.executable, "-m", "tests.saver", "--job", str(folder)]
    loaded = 0
    for number in range(kills + 1):
        before = rounds_in(folder)
        with subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as job:
            try:
                wait_for_saves(folder, 2, job.pid)  # it loads first, or fails
            except TimeoutError:
                job.kill()
                return loaded
            loaded += number > 0 and rounds_in(folder) > before
            victim = int((folder / f"pid-{random.randrange(ranks)}").read_text())
            os.kill(victim, signal.SIGKILL)
            job.communicate(timeout=LIMIT)
    return loaded


def main() -> None:
    """The command line."""
    if sys.argv[1] != "--job":
        print(json.dumps(kill_threads(int(sys.argv[1]))))
        return
    import horovod.torch as hvd

    hvd.init()
    folder = Path(sys.argv[2])
    (folder / f"pid-{hvd.rank()}").write_text(str(os.getpid()))
    save_for_ever(folder, hvd.rank())


if __name__ == "__main__":
    main()
