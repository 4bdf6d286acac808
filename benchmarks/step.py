"""Times the whole step by each way to exchange, in turns on the same ranks.

    launch/horovodrun.sh -np 2 python benchmarks/step.py
    mpirun -np 2 python benchmarks/step.py --model transformer --methods local sign-dc hvd

Backward costs one pass over the parameters (with --rows the products of matrices of a real one as well), the
optimizer is momentum SGD: what is left is the exchange. In each round every method has a turn of some steps,
so that what else the machine does hits all alike. Results are medians over rounds. One thread a rank.
`benchmarks/cluster.py` runs this between hosts with slow links.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import horovod.torch as hvd
import torch.distributed as dist
from mpi4py import MPI
from tqdm import tqdm

from benchmarks.methods import METHODS, Memory, Method, Trainer
from benchmarks.models import SHAPES, Shape
from benchmarks.timings import Timing, plot, table, write
from hvd_saef.transport.hosts import address_of

WORLD = MPI.COMM_WORLD
IDLE_SECONDS = 0.5


def resident() -> int:
    """Bytes of memory that this process has, once what is free is given back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sent(interface: str | None) -> int:
    """What the interface's counter says it sent; 0 without one."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text()) if interface else 0


def claimed(trainer: Trainer) -> float:
    """Bytes that stats() says were sent; NaN where there is no stats()."""
    if not hasattr(trainer.optimizer, "stats"):
        return math.nan
    stats = trainer.optimizer.stats()
    return float(sum(stats[f"{kind}_bytes_sent"] for kind in ("payload", "averaging", "dense")))


def set_up_gloo() -> None:
    """torch.distributed beside MPI, over the same interface, meeting at rank 0's address."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if not interface:
        alone = hvd.local_size() == hvd.size()
        names = [name for _, name in socket.if_nameindex() if (name == "lo") == alone and address_of(name)]
        if not names:
            raise RuntimeError("no interface has an address: name one in GLOO_SOCKET_IFNAME")
        interface = os.environ["GLOO_SOCKET_IFNAME"] = names[0]
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    host, port = WORLD.bcast((address_of(interface), port))
    patience = timedelta(hours=1)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, hvd.size(), hvd.rank() == 0, patience
    )
    dist.init_process_group("gloo", store=store, rank=hvd.rank(), world_size=hvd.size(), timeout=patience)


class Turns:
    """Gives each method its turns, and notes what they took."""

    def __init__(self, args: argparse.Namespace, shapes: list[Shape]) -> None:
        self.args = args
        self.shapes = shapes
        self.memory = Memory.of(shapes, hvd.rank() + 1, args.rows)
        self.kept: dict[Method, Trainer] = {}
        self.steps: dict[Method, int] = {}
        self.idle = 0.0
        """Bytes a second that this rank sends while it does nothing."""

    def measure_idle(self) -> None:
        """Horovod's idle traffic. Collective."""
        WORLD.Barrier()
        before, start = sent(self.args.interface), time.perf_counter()
        time.sleep(IDLE_SECONDS)
        self.idle = (sent(self.args.interface) - before) / (time.perf_counter() - start)
        WORLD.Barrier()

    def build(self, method: Method) -> tuple[Trainer, float]:
        """A trainer that has been warmed up, and the memory that it added. Collective."""
        self.memory.reset()
        before = resident()
        trainer = self.memory.trainer(method.wrap)
        start = time.perf_counter()
        for number in range(method.warmup):
            if number == method.warmup - 1:
                WORLD.Barrier()
                start = time.perf_counter()
            trainer.step()
        WORLD.Barrier()
        if method not in self.steps:
            self.steps[method] = self.number_of_steps(method, time.perf_counter() - start)
        trainer.optimizer.zero_grad()
        return trainer, float(resident() - before)

    def number_of_steps(self, method: Method, seconds: float) -> int:
        """How many steps of `seconds` fill a turn; the same on all ranks."""
        wanted = min(self.args.steps, max(1, int(self.args.seconds / seconds)))
        return int(WORLD.bcast(math.ceil(wanted / method.period) * method.period))

    def turn(self, method: Method, number: int) -> Timing:
        """One method's turn in a round. Collective."""
        added = math.nan
        trainer = self.kept.get(method)
        if trainer is None:
            trainer, added = self.build(method)
            if method.kept:
                self.kept[method] = trainer
        steps, interface = self.steps[method], self.args.interface
        WORLD.Barrier()
        said, counted, start = claimed(trainer), sent(interface), time.perf_counter()
        for _ in range(steps):
            trainer.step()
        WORLD.Barrier()
        seconds = time.perf_counter() - start
        gone = sent(interface) - counted
        if method is METHODS["local"]:  # what goes out all the same, while ranks compute
            self.idle = gone / seconds
        wire = gone - self.idle * seconds if interface else math.nan
        everyone = WORLD.allgather((claimed(trainer) - said, wire, added))
        trainer.optimizer.zero_grad()
        claims, wires, memories = zip(*everyone, strict=True)
        return Timing(
            self.args.model,
            self.args.rate,
            hvd.size(),
            method.name,
            number,
            steps,
            seconds / steps,
            sum(claims) / hvd.size() / steps,
            sum(wires) / hvd.size() / steps,
            method.theory(self.shapes, hvd.size()),
            max(memories),
        )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="resnet50", help="25.6, 100 or 0.1 M parameters")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to compare"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each method")
    parser.add_argument("--steps", type=int, default=8, help="of a turn, at most (but whole periods)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn, about: fewer steps if slow")
    parser.add_argument(
        "--rows", type=int, default=0, help="of the batch that backward multiplies: its cost besides one pass"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "step" / "step.csv", help="the CSV; table and plot beside"
    )
    parser.add_argument(
        "--interface", help="count the bytes that this interface sends (one rank a host, nothing else on it)"
    )
    parser.add_argument("--rate", default="memory", help="of the links, for the table: what cluster.py set")
    return parser.parse_args()


def main() -> None:
    """Run all rounds, and report on rank 0."""
    args = arguments()
    torch.set_num_threads(1)
    hvd.init()
    methods = [METHODS[key] for key in args.methods]
    if any(method.gloo for method in methods):
        set_up_gloo()
    shapes = SHAPES[args.model]()
    turns, timings = Turns(args, shapes), []
    first, terminal = hvd.rank() == 0, sys.stderr.isatty()
    look = {} if terminal else {"bar_format": "{desc}{percentage:3.0f}%|{bar}{r_bar}\n"}
    pause = 1 if terminal else 10
    with tqdm(
        total=args.rounds * len(methods), unit="turn", disable=not first, mininterval=pause, ncols=100, **look
    ) as bar:
        for number in range(args.rounds):
            turns.measure_idle()
            for method in methods:
                bar.set_description(f"{method.name}, round {number + 1}", refresh=False)
                timings.append(turns.turn(method, number))
                bar.update()
    if first:
        write(timings, args.out)
        text = table(timings, sum(map(math.prod, shapes)))
        args.out.with_suffix(".txt").write_text(text + "\n")
        plot([timings], args.out.with_suffix(".png"))
        print(text, f"\nWritten: {args.out}, and .txt and .png beside it", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    WORLD.Barrier()


if __name__ == "__main__":
    main()
