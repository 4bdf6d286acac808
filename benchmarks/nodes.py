"""Times workers of several ranks beside one rank a host, in turns on the same ranks, between namespace hosts.

    python -m benchmarks.nodes --hosts 2 --rate 1gbit          # as root

One job with --ranks ranks a host. Where only the first rank of each host trains, the others take steps of
their own without any exchange, so that each has the same share of the machine's cores in each turn. With
--share it is the host that has the same in each turn, its share of the cores and its batch: where only its
first rank trains, that has all of the batch, and the others sleep. Bytes are those of the hosts' interfaces,
with what goes out during steps without an exchange subtracted, beside those that stats() claims. Results are
medians over rounds.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

import hvd_saef

# isort: split
import horovod.torch as hvd
from mpi4py import MPI

from benchmarks.hosts import INTERFACE, Hosts, stopping_cleanly
from benchmarks.methods import Memory, Trainer
from benchmarks.models import SHAPES, StandIn
from benchmarks.timings import LOCAL, Spread, Timing, spread, write

WORLD = MPI.COMM_WORLD
ONE = "one rank a host"


@dataclass(frozen=True)
class Way:
    """A way to train: which ranks, and how their optimizer is made."""

    name: str
    first_alone: bool
    """Whether only the first rank of each host trains."""
    options: dict[str, Any] | None
    """For hvd_saef.DistributedOptimizer; None is no exchange, {"float32": True} Horovod's own."""


WAYS = {
    "local": Way(LOCAL, False, None),
    "one": Way(ONE, True, {}),
    "node": Way('worker="node"', False, {"worker": "node"}),
    "rank": Way('worker="rank"', False, {}),
    "one-overlap": Way(f"{ONE}, overlap", True, {"overlap": True}),
    "node-overlap": Way('worker="node", overlap', False, {"worker": "node", "overlap": True}),
    "hvd": Way("Horovod float32", False, {"float32": True}),
}


def sent() -> int:
    """What this host's interface says it sent."""
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes").read_text())


class Turns:
    """Gives each way its turns."""

    def __init__(self, args: argparse.Namespace, lanes: list[Any]) -> None:
        self.args = args
        self.shapes = SHAPES[args.model]()
        self.memory = Memory.of(self.shapes, hvd.rank() + 1, args.rows)
        self.first = hvd.local_rank() == 0
        self.lane = lanes[0]
        self.firsts = WORLD.Create_group(WORLD.Get_group().Incl(self.lane.ranks)) if self.first else WORLD
        self.hosts = hvd.size() // hvd.local_size()
        self.idle = 0.0
        self.steps: dict[str, int] = {}

    def trainer(self, way: Way) -> Trainer:
        """With its memory; Horovod's process sets are there already."""

        def wrap(model: StandIn, optimizer: torch.optim.Optimizer) -> tuple[torch.nn.Module, Any]:
            trains = way.options is not None and (self.first or not way.first_alone)
            if not trains:
                return model, optimizer
            if way.options == {"float32": True}:
                return model, hvd.DistributedOptimizer(optimizer, model.named_parameters())
            options: dict[str, Any] = dict(way.options or {})
            options |= {"process_set": self.lane} if way.first_alone else {}
            return model, hvd_saef.DistributedOptimizer(
                optimizer, model.named_parameters(), model=model, **options
            )

        self.memory.reset()
        shares = self.args.ranks if self.args.share and not way.first_alone else 1
        self.memory.rows = self.args.rows // shares
        return self.memory.trainer(wrap)

    def take(self, way: Way, trainer: Trainer, steps: int) -> float:
        """Seconds of so many steps. Collective over all ranks."""
        WORLD.Barrier()
        start = time.perf_counter()
        if way.first_alone and not self.first:
            over = WORLD.Ibarrier()
            while not over.Test():
                if self.args.share:
                    time.sleep(0.001)
                else:
                    trainer.step()
            return 0.0
        for _ in range(steps):
            trainer.step()
        (self.firsts if way.first_alone else WORLD).Barrier()  # the others look seldom
        seconds = time.perf_counter() - start
        if way.first_alone:
            WORLD.Ibarrier().Wait()
        return seconds

    def turn(self, way: Way, number: int) -> Timing:
        """One way's turn in a round. Collective."""
        trainer = self.trainer(way)  # built anew each time: memory is free while others are timed
        self.take(way, trainer, 1)
        once = self.take(way, trainer, 1)
        if way.name not in self.steps:
            wanted = min(self.args.steps, max(2, int(self.args.seconds / max(once, 1e-3))))
            self.steps[way.name] = int(WORLD.bcast(wanted))
        steps, before, counted = self.steps[way.name], _stats(trainer), sent()
        seconds = self.take(way, trainer, steps)
        gone, after = sent() - counted, _stats(trainer)
        trainer.optimizer.zero_grad()
        if way.options is None:
            self.idle = gone / seconds
        seconds = float(WORLD.bcast(seconds))
        wire = gone - self.idle * seconds if self.first else math.nan
        wires = [one for one in WORLD.allgather(wire) if not math.isnan(one)]
        return Timing(
            self.args.model,
            self.args.rate,
            self.hosts,
            way.name,
            number,
            steps,
            seconds / steps,
            (after - before) / steps,
            sum(wires) / len(wires) / steps,
            math.nan,
            math.nan,
        )


def _stats(trainer: Trainer) -> float:
    """Bytes between workers that stats() claims for this rank's worker."""
    if not hasattr(trainer.optimizer, "stats"):
        return math.nan
    stats = trainer.optimizer.stats()
    return float(sum(stats[f"{kind}_bytes_sent"] for kind in ("payload", "averaging", "dense")))


def table(timings: list[Timing], args: argparse.Namespace) -> str:
    """A way a row; ratios to one rank a host are taken within each round."""
    rounds: dict[str, dict[int, Timing]] = {}
    for timing in timings:
        rounds.setdefault(timing.method, {})[timing.round] = timing
    batch = f"{args.rows} rows" + (", which a host's ranks share" if args.share else "")
    others = "sleep" if args.share else "take steps without exchange"
    lines = [
        f"{args.model}, {timings[0].workers} hosts of {args.ranks} ranks, {args.rate}, backward with "
        f"{batch}, {os.cpu_count()} cores for all; where one rank a host trains, the others "
        f"{others}: medians of {args.rounds} rounds (quartiles)",
        f"{'way':<28}{'seconds a step':>28}{'over one rank a host':>30}"
        f"{'MB: stats, a worker':>22}{'wire, a host':>14}{'over one':>10}",
    ]

    def ratio(name: str, what: Callable[[Timing], float]) -> Spread:
        beside = rounds.get(f"{ONE}, overlap" if "overlap" in name else ONE, {})
        return spread(what(t) / what(beside[n]) for n, t in rounds[name].items() if n in beside)

    for name, turns in rounds.items():
        seconds = spread(t.seconds for t in turns.values())
        claims = spread(t.claimed_bytes for t in turns.values()).median / 1e6
        wire = spread(t.interface_bytes for t in turns.values()).median / 1e6
        over = "-" if name == LOCAL else f"{ratio(name, lambda t: t.interface_bytes).median:.3f}"
        lines.append(
            f"{name:<28}{seconds!s:>28}{ratio(name, lambda t: t.seconds)!s:>30}"
            f"{claims:>22.3f}{wire:>14.3f}{over:>10}"
        )
    return "\n".join(lines)


def work(args: argparse.Namespace) -> None:
    """What each rank does."""
    torch.set_num_threads(1)
    sets = hvd_saef.process_sets()
    hvd.init(process_sets=sets)
    turns = Turns(args, sets[hvd.size() // hvd.local_size() :])
    timings = [turns.turn(WAYS[way], number) for number in range(args.rounds) for way in args.ways]
    if hvd.rank() == 0:
        write(timings, args.out)
        text = table(timings, args)
        args.out.with_suffix(".txt").write_text(text + "\n")
        print(text, f"\nWritten: {args.out}, and .txt beside it", flush=True)
    WORLD.Barrier()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2, help="namespaces")
    parser.add_argument("--ranks", type=int, default=2, help="on each host")
    parser.add_argument("--rate", default="1gbit", help="of the hosts' links")
    parser.add_argument("--model", choices=SHAPES, default="resnet50", help="25.6, 100 or 0.1 M parameters")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what to compare")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way")
    parser.add_argument("--steps", type=int, default=16, help="of a turn, at most")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn, about")
    parser.add_argument("--rows", type=int, default=0, help="of the matrices in a backward: its cost")
    parser.add_argument("--share", action="store_true", help="a host's ranks share its batch of --rows")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "nodes" / "nodes.csv", help="the CSV")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Make the hosts and start the job in them; or, in the job, time."""
    args = arguments()
    args.out = args.out.absolute()
    if args.inside:
        work(args)
        return 0
    command = [sys.executable, "-W", "ignore", "-m", "mpi4py", str(Path(__file__)), *sys.argv[1:], "--inside"]
    run = functools.partial(Hosts.run, timeout=3600)
    with stopping_cleanly(), Hosts(args.hosts, args.rate) as hosts:
        return run(hosts, hosts.mpirun(command, args.ranks))


if __name__ == "__main__":
    sys.exit(main())
