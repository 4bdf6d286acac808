"""Denormal numbers: flushed in all threads that compute for a rank or in none, and alike on all ranks."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import hvd_saef
from hvd_saef import ConfigurationMismatchError, kernels
from hvd_saef.transport.background import Background, denormals, flushes_denormals
from tests.kernels.versions import compiled
from tests.workers import NO_MODEL, bits, caught, together

pytestmark = pytest.mark.filterwarnings(NO_MODEL, "ignore:the largest block")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Tests of this file leave this thread's arithmetic as it was."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormal numbers")
    torch.set_flush_denormal(False)
    yield
    torch.set_flush_denormal(False)


def test_what_this_thread_does() -> None:
    assert not flushes_denormals()
    torch.set_flush_denormal(True)
    assert flushes_denormals()


@pytest.mark.parametrize("flush", [False, True])
def test_a_thread_in_the_background_does_the_same(flush: bool) -> None:
    torch.set_flush_denormal(not flush)
    thread = Background("flush")
    assert thread.submit(flushes_denormals).result() is not flush
    torch.set_flush_denormal(flush)  # after the thread began
    assert thread.submit(flushes_denormals).result() is flush
    thread.shutdown()


def test_what_is_found_in_torchs_threads() -> None:
    found = []

    def look() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        found.append(denormals())  # which starts torch's threads for this one
        torch.set_flush_denormal(True)
        found.append(denormals())
        torch.set_num_threads(1)
        found.append(denormals())
        torch.set_num_threads(before)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == ["off", "on in some threads", "on"]


class Tiny:
    """A worker whose parameters, errors and updates are all about the least normal number."""

    def __init__(self, rank: int, flush: bool, **options: Any) -> None:
        torch.set_flush_denormal(flush)
        self.rank, self.taken = rank, 0
        self.parameter = nn.Parameter(self.numbers(7))
        options = {"bucket_bytes": 64} | options
        self.optimizer = hvd_saef.DistributedOptimizer(
            torch.optim.SGD([self.parameter, nn.Parameter(self.numbers(8))], lr=1.0), **options
        )

    def numbers(self, seed: int) -> torch.Tensor:
        """About the least normal number."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(40, generator=generator) * 1.5e-38

    def step(self, times: int = 1) -> Tiny:
        """Some steps."""
        for _ in range(times):
            for i, group in enumerate(self.optimizer.param_groups):
                for j, parameter in enumerate(group["params"]):
                    parameter.grad = self.numbers(100 * self.taken + 10 * self.rank + 3 * i + j)
            self.optimizer.step()
            self.taken += 1
        return self

    def x(self) -> dict[str, bytes]:
        """The bits of x."""
        return bits(list(self.optimizer.state_dict()["hvd_saef"]["x"].values()))


SETTINGS: list[dict[str, Any]] = [
    {"server": "replicated"},
    {"server": "sharded"},
    {"double_compression": False},
    {"compression": hvd_saef.Compression.topk(0.2)},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_ranks_that_differ_are_named_at_the_first_step(options: dict[str, Any]) -> None:
    def fn(rank: int) -> None:
        Tiny(rank, flush=rank == 1, **options).step()

    words = r"workers disagree on torch\.set_flush_denormal: 'off' on ranks 0, 2, 'on.*' on rank 1"
    for failure in caught(3, fn):
        assert isinstance(failure, ConfigurationMismatchError)
        assert re.match(words, str(failure))


def test_a_rank_that_changes_while_training_is_named() -> None:
    def fn(rank: int) -> dict[str, bytes]:
        worker = Tiny(rank, flush=False).step(2)
        torch.set_flush_denormal(rank == 1)
        with pytest.raises(ConfigurationMismatchError, match=r"'on.*' on rank 1"):
            worker.step()
        torch.set_flush_denormal(False)
        return worker.step(2).x()

    first, second = together(2, fn)
    assert first == second


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_all_may_change_while_training(options: dict[str, Any]) -> None:
    def fn(rank: int, when: int) -> dict[str, bytes]:
        worker = Tiny(rank, flush=False, check_consensus_every=1, **options).step(when)
        torch.set_flush_denormal(True)
        return worker.step(6 - when).x()

    seen = [together(2, lambda rank, when=when: fn(rank, when)) for when in (0, 3, 6)]  # type: ignore[misc]
    assert all(first == second for first, second in seen)
    assert len({repr(first) for first, _ in seen}) == 3  # there is something to flush


def test_the_background_computes_as_the_foreground(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets take turns between threads: the same x, whatever thread it is that serves and decodes them."""

    def run(options: dict[str, Any]) -> Callable[[int], dict[str, bytes]]:
        def fn(rank: int) -> dict[str, bytes]:
            worker = Tiny(rank, flush=False, **options).step(2)  # background threads begin without flushing
            torch.set_flush_denormal(True)
            return worker.step(4).x()

        return fn

    alone = {"bucket_bytes": 1 << 20}  # one bucket, and all in one thread
    wanted = together(2, run(alone))
    assert together(2, run({"bucket_bytes": 64})) == wanted

    class Deaf(Background):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
            return ThreadPoolExecutor.submit(self, fn, *args, **kwargs)

    monkeypatch.setattr("hvd_saef.transport.communicator.Background", Deaf)  # the counter-test
    assert together(2, run({"bucket_bytes": 64})) != wanted


@pytest.mark.skipif(compiled is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_kernels_and_twins_flush_alike(options: dict[str, Any], flush: bool) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        return Tiny(rank, flush, **options).step(5).x()

    fast = together(2, fn)
    with kernels.only("twins"):
        assert together(2, fn) == fast
