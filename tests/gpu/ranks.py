"""One rank of a job over torch.distributed with gloo, all of whose ranks have one device.

    python -m tests.gpu.ranks OUTPUT DEVICE STEPS

tests/gpu/process_checks.py starts it. Each rank writes what was wrong, as JSON, into OUTPUT.RANK.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.gpu.pieces import Place
from hvd_saef import kernels
from tests.gpu.registry import best
from tests.gpu.worker_checks import TOLERANCE, Training, exact, setups, trained, wanted
from tests.oracle import run
from tests.problems import curved_valley, run_library, same_bits, start_point, worst
from tests.problems import schedule as decaying


def gathered(value: Any) -> list[Any]:
    """Everyone's values, in rank order."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def the_bits_of_threads_and_the_cpu(place: Place, steps: int) -> None:
    """And x has the same bits on all ranks."""
    workers, rank = dist.get_world_size(), dist.get_rank()
    for settings, server in setups(place):
        setup = wanted(workers, settings, lr=exact)

        def at(number: int, start: torch.Tensor) -> torch.Tensor:
            return start.to(place.device)

        options: dict[str, Any] = {"server": server, "dtype": torch.float32}
        outcome = run_library(setup, rank, start_point(), steps=steps, place=at, **options)
        x = np.concatenate([array.reshape(-1) for array in outcome.x])
        assert len(set(gathered(x.tobytes()))) == 1, settings
        with kernels.only("twins"):
            on_cpu = trained(setup, workers * [torch.device("cpu")], steps, **options)[rank]
        assert same_bits(outcome.x, on_cpu.x), settings
        assert same_bits(outcome.errors, on_cpu.errors), settings
        if not place.tiny:
            by_threads = trained(setup, workers * [place.device], steps, **options)[rank]
            assert same_bits(outcome.parameters, by_threads.parameters), settings


def the_oracle(place: Place, steps: int) -> None:
    """With momentum, and with means of floats."""
    workers, rank = dist.get_world_size(), dist.get_rank()
    for settings, server in setups(place, with_means=True)[-2:]:
        setup = wanted(workers, settings, optimizer="sgdm", lr=decaying)
        truth = run(setup, start_point(), curved_valley, steps)
        outcome = run_library(
            setup,
            rank,
            start_point(),
            steps=steps,
            place=lambda number, start: start.to(place.device),
            server=server,
        )
        assert worst(outcome.x, truth.x) <= TOLERANCE, settings
        assert worst(outcome.parameters, truth.parameters[rank]) <= TOLERANCE, settings


def a_real_backward(place: Place, steps: int) -> None:
    """Models with overlap and without: the same bits, and one x."""
    found = [
        Training(place, dist.get_rank(), overlap=overlap).step(steps).everything()
        for overlap in (False, True)
    ]
    assert found[0] == found[1]
    x = {name: bits for name, bits in found[0].items() if "/hvd_saef/x/" in name}
    assert x
    assert all(theirs == x for theirs in gathered(x))


CHECKS: list[Callable[[Place, int], None]] = [
    the_bits_of_threads_and_the_cpu,
    the_oracle,
    a_real_backward,
]


def main(output: str, device: str, steps: str) -> None:
    """Run all checks, on all ranks."""
    dist.init_process_group("gloo")
    place = Place(torch.device(device), tiny=device == "cpu")
    wrong: dict[str, str] = {}
    warnings.simplefilter("ignore")
    for check in CHECKS:
        try:
            with kernels.only(best(place)):
                check(place, int(steps))
        except Exception:
            wrong[check.__name__] = traceback.format_exc()
        if any(gathered(bool(wrong))):
            break
    Path(f"{output}.{dist.get_rank()}").write_text(json.dumps(wrong))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
