"""What the default protections cost: steps with and without them, in turns on the same ranks.

    mpirun -np 2 python benchmarks/protections.py [--model resnet50] [--rows 850]

The step as it is takes turns with one that has none of them, and with one for each that lacks only that one.
A backward costs one pass over the parameters, the harshest case; with --rows also the products of matrices of
a batch: with 850 the step is of the order of a network's own. Medians and quartiles of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hvd_saef

# isort: split
import horovod.torch as hvd
import torch
from mpi4py import MPI

from benchmarks.methods import Memory
from benchmarks.models import SHAPES
from hvd_saef.round import local_steps
from hvd_saef.round.agreement import Word
from hvd_saef.round.guard import Guard
from hvd_saef.transport import watch


def _plain_wait(self: Any, done: Callable[[], bool], *_: Any) -> None:
    pause = 0.0
    while not done():
        time.sleep(pause)
        pause = min(pause + watch.PAUSE_STEP, watch.PAUSE)


def _fine(*_: Any) -> bool:
    return True


def _nothing(*_: Any) -> None:
    pass


def _no_word(*_: Any) -> Word:
    return Word.NOTHING


PARTS: dict[str, list[tuple[Any, str, Any]]] = {
    "gradients are looked at": [(local_steps, "look_at_gradients", _no_word)],
    "parameters are looked at": [(local_steps, "kernels", SimpleNamespace(squares_fit=_fine))],
    "all agree once more": [(local_steps, "agree", _no_word)],
    "parameters are what was wrapped": [(Guard, "check", _nothing)],
    "waits are watched": [(watch.Watch, "wait", _plain_wait), (watch.Watch, "tidy", _nothing)],
}
"""The protections that are there by default, and what stands in for each."""


@contextlib.contextmanager
def without(parts: Iterable[str]) -> Iterator[None]:
    """These protections are not there."""
    with contextlib.ExitStack() as stack:
        for part in parts:
            for thing, name, instead in PARTS[part]:
                stack.enter_context(mock.patch.object(thing, name, instead))
        yield


def main() -> None:
    """Time turns with and without, and print the ratio on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=list(PARTS), help="to take away one by one"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    hvd.init()
    memory = Memory.of(SHAPES[args.model](), hvd.rank() + 1, args.rows)
    memory.reset()
    trainer = memory.trainer(
        lambda model, optimizer: (
            model,
            hvd_saef.DistributedOptimizer(optimizer, model.named_parameters(), model=model),
        )
    )

    def turn() -> float:
        MPI.COMM_WORLD.Barrier()
        start = time.perf_counter()
        for _ in range(args.steps):
            trainer.step()
        MPI.COMM_WORLD.Barrier()
        took: float = (time.perf_counter() - start) / args.steps
        return took

    turn()
    turns: dict[str, list[str]] = {"all": [], "none": list(PARTS)} | {part: [part] for part in args.parts}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(args.rounds):
        order = list(turns)[number % len(turns) :] + list(turns)[: number % len(turns)]
        for name in order if number % 2 else order[::-1]:
            with without(turns[name]):
                seconds[name].append(turn())
    if hvd.rank() == 0:
        ratios = [a / b - 1 for a, b in zip(seconds["all"], seconds["none"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{args.model}, {hvd.size()} ranks, backward of {args.rows} rows: the default protections "
            f"add {middle:.1%} ({low:.1%} to {high:.1%}), {lacking(seconds, 'none'):.1f} ms a step of "
            f"{statistics.median(seconds['none']):.3f} s"
        )
        for part in args.parts:
            print(f"  {part:34}{lacking(seconds, part):6.1f} ms")


def lacking(seconds: Mapping[str, list[float]], name: str) -> float:
    """By how many milliseconds a step is shorter where that is missing; the median."""
    return 1e3 * statistics.median(a - b for a, b in zip(seconds["all"], seconds[name], strict=True))


if __name__ == "__main__":
    main()
