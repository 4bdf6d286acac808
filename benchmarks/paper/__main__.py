"""Runs the paper's experiments.

    python -m benchmarks.paper list
    python -m benchmarks.paper run small --data cifar10_subset.npz --at-once 2

A preset is a list of runs, each of which trains one task by one method from one seed and writes one CSV,
a row an epoch. Finished runs are skipped, interrupted ones go on from their last epoch. The K workers are
threads of one process, or with --mpi the ranks that horovodrun, mpirun or srun started.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from tqdm import tqdm

import hvd_saef
from benchmarks.paper.presets import PRESETS, Piece
from benchmarks.paper.rows import read
from benchmarks.paper.training import load, run

ROOT = Path(__file__).resolve().parents[2]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the presets")
    runner = commands.add_parser("run", help="train what is missing of presets")
    runner.add_argument("presets", nargs="+", choices=PRESETS, metavar="preset", help=", ".join(PRESETS))
    runner.add_argument("--data", type=Path, help="folder or file of the data set, where it needs one")
    runner.add_argument("--out", type=Path, default=ROOT / "runs" / "paper", help="folder for the CSVs")
    runner.add_argument("--seeds", type=int, nargs="+", help="these alone")
    runner.add_argument("--methods", nargs="+", help="these alone, by their names")
    runner.add_argument("--tasks", nargs="+", help="these alone, by their names")
    runner.add_argument("--at-once", type=int, default=1, help="runs side by side, a process each")
    runner.add_argument("--core", type=int, help="stay on this core: K threads on one are cheapest")
    runner.add_argument("--mpi", action="store_true", help="the workers are the ranks of this MPI job")
    runner.add_argument("--tensorboard", type=Path, help="folder for TensorBoard's scalars")
    args = parser.parse_args()
    if args.command == "run" and args.mpi and args.at_once > 1:
        parser.error("--mpi runs one piece after the other: leave out --at-once")
    if args.command == "run" and args.tensorboard and find_spec("tensorboard") is None:
        parser.error("--tensorboard needs it: pip install 'hvd_saef[tensorboard]'")
    return args


def wanted(args: argparse.Namespace) -> list[Piece]:
    """The runs that the command line names, each once."""
    pieces = dict.fromkeys(piece for name in args.presets for piece in PRESETS[name].pieces())
    return [
        piece
        for piece in pieces
        if (not args.seeds or piece.seed in args.seeds)
        and (not args.methods or piece.method.name in args.methods)
        and (not args.tasks or piece.task.name in args.tasks)
    ]


def run_here(args: argparse.Namespace, piece: Piece, visible: bool) -> None:
    """One run in this process, with a bar of its steps."""
    steps = len(load(piece.task.load, args.data).train) // piece.task.batch * piece.task.epochs
    terminal = sys.stderr.isatty()
    with tqdm(
        total=steps,
        unit="step",
        disable=not visible,
        mininterval=1 if terminal else 30,
        ncols=110,
        desc=piece.name,
    ) as bar:

        def work(rank: int = 0) -> None:
            run(piece, args.out, args.data, bar.update, args.tensorboard)

        if args.mpi:
            work()
        else:
            hvd_saef.run_workers(piece.task.workers, work)


def run_apart(args: argparse.Namespace, piece: Piece, cores: SimpleQueue[int]) -> int:
    """One run in a process of its own on a core of its own; its log is beside its CSV."""
    core = cores.get()
    command = [sys.executable, "-m", "benchmarks.paper", "run", *args.presets, "--out", str(args.out)]
    command += ["--tasks", piece.task.name, "--methods", piece.method.name, "--seeds", str(piece.seed)]
    command += ["--core", str(core)]
    for option, value in (("--data", args.data), ("--tensorboard", args.tensorboard)):
        command += [option, str(value)] if value else []
    log = piece.file(args.out).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as stream:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.call(command, stdout=stream, stderr=stream, env=environment)
    cores.put(core)
    if code == 0:
        log.unlink()
    return code


def main() -> int:
    """Do what the command line says."""
    args = arguments()
    if args.command == "list":
        for preset in PRESETS.values():
            print(f"{preset.name}: {preset.about}; {len(list(preset.pieces()))} runs")
            for group in preset.groups:
                print(f"  {group.task.name}, {group.seeds} seeds: {', '.join(group.methods)}")
        return 0
    torch.set_num_threads(1)
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    rank: Any = 0
    if args.mpi:
        import horovod.torch as hvd

        hvd.init()
        rank = hvd.rank()
    missing = [piece for piece in wanted(args) if len(read(piece.file(args.out))) < piece.task.epochs]
    if args.at_once == 1:
        for piece in missing:
            run_here(args, piece, visible=rank == 0)
        return 0
    failed = 0
    cores: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[-args.at_once :]:
        cores.put(core)
    with (
        ThreadPoolExecutor(args.at_once) as pool,
        tqdm(total=len(missing), unit="run", ncols=110, mininterval=30) as bar,
    ):
        coming = [(piece, pool.submit(run_apart, args, piece, cores)) for piece in missing]
        try:
            for piece, code in coming:
                if code.result():
                    failed += 1
                    bar.write(f"{piece.name}: failed, see {piece.file(args.out).with_suffix('.log')}")
                bar.update()
        except KeyboardInterrupt:  # those that run have had it, too
            pool.shutdown(cancel_futures=True)
            return 130
    return 1 if failed else 0


if __name__ == "__main__":
    warnings.simplefilter("default")
    sys.exit(main())
