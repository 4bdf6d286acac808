"""Programs for as long as is wanted, other ones each time: python -m tests.machine --seconds 3600.

A process a core draws them, each from its own seed. Prints every program that fails, as Python, and goes on;
only a process's first one is made as small as it can be, which takes minutes. Prints how many programs and
actions ran, and ends with 1 if the library did not as the model in some.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import secrets
import time
import warnings
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.machine.programs import programs
from tests.machine.running import Program, check

BATCH = 50
"""Programs between two seeds."""


def some(seed: int, end: float, shrinks: bool, ran: list[int]) -> None:
    """Run BATCH programs, or those until `end`; add to `ran` how many programs and actions did as the model.

    Raises AssertionError with one that fails: the smallest that can be made of it, if `shrinks`.
    """

    @hypothesis.seed(seed)
    @settings(
        max_examples=BATCH,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink] if shrinks else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def one(program: Program) -> None:
        if time.monotonic() < end:
            ran[1] += check(program)
            ran[0] += 1

    one()


def work(core: int, seed: int, seconds: float, found: Queue[Any]) -> None:
    """One process, on one core, where threads hand over fastest: what it ran, and what failed."""
    os.sched_setaffinity(0, {core})
    warnings.simplefilter("ignore")
    end = time.monotonic() + seconds
    ran, failures = [0, 0], 0
    while time.monotonic() < end:
        try:
            some(seed, end, not failures, ran)
        except Exception as error:
            failures += 1
            print(f"{error}\n(seed {seed})", flush=True)
        print(f"seed {seed}: {ran[0]} programs, {ran[1]} actions, {failures} failed", flush=True)
        seed += 1
    found.put((*ran, failures))


def _next(found: Queue[Any], processes: Sequence[BaseProcess]) -> tuple[int, int, int]:
    """What the next process to end ran, and how often it failed; one that died says nothing, and fails."""
    while True:
        dead = [process.name for process in processes if process.exitcode]
        try:
            told: tuple[int, int, int] = found.get(timeout=5.0)
            return told
        except queue.Empty:
            if dead:
                print(f"{dead} died")
                return 0, 0, 1


def main() -> int:
    """Start the processes, and say what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 30))
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: Queue[Any] = context.Queue()
    seeds = [arguments.seed + 1_000_000 * i for i in range(arguments.processes)]
    cores = sorted(os.sched_getaffinity(0))
    processes = [
        context.Process(
            target=work, args=(cores[i % len(cores)], seed, arguments.seconds, found), daemon=True
        )
        for i, seed in enumerate(seeds)
    ]
    for process in processes:
        process.start()
    programs_ran = actions_ran = failed = 0
    for _ in processes:
        number, actions, failures = _next(found, processes)
        programs_ran, actions_ran, failed = programs_ran + number, actions_ran + actions, failed + failures
    print(f"{programs_ran} programs, {actions_ran} actions as in the model; {failed} programs failed")
    return 1 if failed else 0
