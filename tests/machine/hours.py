"""Programs for as long as is wanted, other ones each time: python -m tests.machine --seconds 3600.

A process a core draws them, each from its own seed. Ends with 1 and the smallest failing program that was
found, as Python, if the library did not as the model; prints how many programs and actions ran.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.machine.programs import programs
from tests.machine.running import Program, check

BATCH = 100
"""Programs between two looks at the clock."""


def some(seed: int, number: int) -> tuple[int, int]:
    """Run so many; how many programs and actions ran. Raises AssertionError with the smallest that fails."""
    ran = [0, 0]

    @hypothesis.seed(seed)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def one(program: Program) -> None:
        ran[1] += check(program)
        ran[0] += 1

    one()
    return ran[0], ran[1]


def batches(seed: int, seconds: float) -> Iterator[tuple[int, int]]:
    """Until the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield some(seed, BATCH)
        seed += 1


def work(core: int, seed: int, seconds: float, found: Queue[Any]) -> None:
    """One process, on one core, where threads hand over fastest: what it ran, or what failed."""
    os.sched_setaffinity(0, {core})
    warnings.simplefilter("ignore")
    programs_ran = actions_ran = 0
    failure = ""
    try:
        for number, actions in batches(seed, seconds):
            programs_ran, actions_ran = programs_ran + number, actions_ran + actions
            print(f"seed {seed}: {programs_ran} programs, {actions_ran} actions", flush=True)
    except Exception as error:
        failure = f"{error}\n(seed {seed})"
    found.put((programs_ran, actions_ran, failure))


def _next(found: Queue[Any], processes: Sequence[BaseProcess]) -> tuple[int, int, str]:
    """What the next process to end found; a failure, if one died before it said anything."""
    while True:
        dead = [process.name for process in processes if process.exitcode]
        try:
            told: tuple[int, int, str] = found.get(timeout=5.0)
            return told
        except queue.Empty:
            if dead:
                return 0, 0, f"{dead} died"


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
    programs_ran = actions_ran = 0
    for _ in processes:
        number, actions, failure = _next(found, processes)
        programs_ran, actions_ran = programs_ran + number, actions_ran + actions
        if failure:
            print(failure)
            for process in processes:
                process.terminate()
            return 1
    print(f"{programs_ran} programs, {actions_ran} actions: all as in the model")
    return 0
