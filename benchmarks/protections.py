"""What the default protections cost: steps with and without them, in turns on the same ranks.

    mpirun -np 2 python benchmarks/protections.py [--model resnet50] [--rows 850]

With: gradients and parameters are looked at, all agree after the local step as well as before it, parameters
are compared with what was wrapped, and waits are watched. Without: all that is replaced by nothing. A
backward costs one pass over the parameters, the harshest case; with --rows also the products of matrices of a
batch: with 850 the step is of the order of a network's own. Medians and quartiles of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hvd_saef  # before hvd.init()

# isort: split
import horovod.torch as hvd
import torch
from mpi4py import MPI

from benchmarks.methods import Memory
from benchmarks.models import SHAPES
from hvd_saef import kernels, local_steps, watch
from hvd_saef.agreement import Word
from hvd_saef.guard import Guard


def _plain_wait(self: Any, done: Callable[[], bool], *_: Any) -> None:
    pause = 0.0
    while not done():
        time.sleep(pause)
        pause = min(pause + watch.PAUSE_STEP, watch.PAUSE)


def _take_plainly(self: Any, local_step: Callable[[], None], *_: Any) -> bool:
    with self._statistics.phase("local_step"):
        local_step()
    return True


@contextlib.contextmanager
def without_protections() -> Iterator[None]:
    """Nothing is looked at, and nothing watched."""
    with contextlib.ExitStack() as stack:
        for thing, name, instead in (
            (kernels, "squares_fit", lambda tensors: True),
            (local_steps, "look_at_gradients", lambda gradients: Word.NOTHING),
            (local_steps.LocalSteps, "take", _take_plainly),
            (Guard, "check", lambda self, layout: None),
            (watch.Watch, "wait", _plain_wait),
            (watch.Watch, "tidy", lambda self: None),
        ):
            stack.enter_context(mock.patch.object(thing, name, instead))
        yield


def main() -> None:
    """Time turns with and without, and print the ratio on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=0)
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
    ratios, seconds = [], []
    for number in range(args.rounds):
        pair = {}
        for protected in (True, False) if number % 2 else (False, True):
            with contextlib.nullcontext() if protected else without_protections():
                pair[protected] = turn()
        ratios.append(pair[True] / pair[False] - 1)
        seconds.append(pair[True] - pair[False])
    if hvd.rank() == 0:
        low, middle, high = statistics.quantiles(ratios, n=4)
        step = statistics.median(seconds) / middle if middle else float("nan")
        print(
            f"{args.model}, {hvd.size()} ranks, backward of {args.rows} rows: the default protections "
            f"add {middle:.1%} ({low:.1%} to {high:.1%}), {1e3 * statistics.median(seconds):.1f} ms a step "
            f"of about {step:.3f} s"
        )


if __name__ == "__main__":
    main()
