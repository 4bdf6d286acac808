"""What all tests share: the kernels and the twins in turn, on a core of their own where they are threads."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from hvd_saef import kernels
from tests.kernels.versions import compiled
from tests.spreading import pytest_xdist_make_scheduler

__all__ = ["pytest_xdist_make_scheduler"]  # a hook of pytest's
BOTH = "both_arithmetics"
"""The mark of tests about the arithmetic and its bits: they run with the kernels and on the twins."""


NUMBER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
"""This process's among those that run tests; "" if it is the only one."""


@contextmanager
def on_one_core() -> Iterator[None]:
    """Keeps the process, and threads that it starts, on one core: each process of the tests on its own."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(NUMBER or 0) % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module", autouse=True)
def arithmetic(request: pytest.FixtureRequest) -> Iterator[str]:
    """With the kernels, as they are here; or on the twins: "kernels" or "twins"."""
    chosen: str = getattr(request, "param", "kernels")
    with kernels.only("twins" if chosen == "twins" else kernels.requested()):
        yield chosen


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> None:
    """Lets collections of garbage, of which each wrapping does one, pass by what was there before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def one_core(request: pytest.FixtureRequest) -> Iterator[None]:
    """Workers that are threads hand over nearly twice as fast on one core: each process takes its own."""
    threads = request.node.get_closest_marker(BOTH) is not None
    with on_one_core() if threads and NUMBER else nullcontext():
        yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Both kinds of arithmetic for what is marked so, where the kernels are built."""
    if metafunc.definition.get_closest_marker(BOTH) is not None and compiled is not None:
        metafunc.parametrize("arithmetic", ["kernels", "twins"], indirect=True, scope="module")


@pytest.fixture(params=compiled.instruction_sets() if compiled else [])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each that this CPU has; skipped where the kernels are not built."""
    assert compiled is not None
    before = compiled.set_instruction_set(request.param)
    yield request.param
    compiled.set_instruction_set(before)
