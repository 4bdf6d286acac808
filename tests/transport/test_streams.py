"""Each use of a GPU's memory comes after what it needs; without any one of the waits, it does not.

No GPU: tests/stand_in.py.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef import Compression, kernels
from hvd_saef.round.statistics import Statistics
from hvd_saef.simulation import run_workers
from hvd_saef.transport import streams
from hvd_saef.transport.staging import Staging, reaches_mpi
from tests import stand_in as cuda
from tests.pretended import run_pretended
from tests.stand_in import GPU, OnGpu, Recorder, stand_in
from tests.workers import NO_MODEL

pytestmark = pytest.mark.filterwarnings(
    NO_MODEL, "ignore:the largest block", "ignore:parameter .* was changed outside"
)
PACKAGE = Path(hvd_saef.__path__[0])
SIZES = (40, 30, 7, 33)
SMALL = 150
"""Bytes of a bucket: several buckets."""


class Training:
    """One rank's parameters and optimizer, on the pretended GPU or, for comparison, on the CPU."""

    def __init__(self, rank: int, on_gpu: bool, **options: Any) -> None:
        self.rank, self.on_gpu = rank, on_gpu
        start, self.data = torch.Generator().manual_seed(7), torch.Generator().manual_seed(100 + rank)
        self.parameters = [nn.Parameter(self.put(torch.randn(n, generator=start))) for n in SIZES]
        self.inner = torch.optim.SGD(self.parameters, lr=0.1, momentum=0.9)
        named = [(str(i), p) for i, p in enumerate(self.parameters)]
        options = {"bucket_bytes": SMALL} | options
        self.optimizer: Any = hvd_saef.DistributedOptimizer(self.inner, named, **options)

    def put(self, tensor: Tensor) -> Tensor:
        """Put a tensor of the CPU where this training is."""
        return cuda.CURRENT.to_gpu(tensor) if self.on_gpu else tensor

    def backward(self, which: slice = slice(None)) -> None:
        """Give some parameters gradients; hooks are called as in every backward pass."""
        for parameter in self.parameters[which][::-1]:
            wanted = self.put(torch.randn(parameter.shape, generator=self.data))
            (parameter * wanted + parameter.square()).sum().backward()

    def steps(self, number: int) -> None:
        """Some steps of training."""
        for _ in range(number):
            self.optimizer.zero_grad()
            self.backward()
            self.optimizer.step()

    def x(self) -> list[Tensor]:
        """The consensus point, on the CPU."""
        return [value.cpu() for value in self.optimizer.state_dict()["hvd_saef"]["x"].values()]


def rounds(rank: int, on_gpu: bool, **options: Any) -> list[Tensor]:
    """Some rounds, in a stream of the user's own; and what else uses x, e and s."""
    training = Training(rank, on_gpu, **options)
    if on_gpu:
        with torch.cuda.stream(torch.cuda.Stream(GPU)):
            return _rounds(training)
    return _rounds(training)


def _rounds(training: Training) -> list[Tensor]:
    training.steps(2)
    training.optimizer.eval()
    training.optimizer.train()
    training.optimizer.consolidate()
    training.steps(1)
    training.optimizer.stats()
    return training.x()


def looks_between(rank: int, on_gpu: bool, **options: Any) -> list[Tensor]:
    """With overlap: the parameters are read between backward and step()."""
    training = Training(rank, on_gpu, overlap=True, **options)
    training.steps(1)
    training.optimizer.zero_grad()
    training.backward()
    training.optimizer.eval()
    training.optimizer.train()
    return []


def abandoned(rank: int, on_gpu: bool, **options: Any) -> list[Tensor]:
    """A step that all ranks give up, since one has a number that is not finite. One bucket has not left."""
    training = Training(rank, on_gpu, overlap=True, **options)
    training.steps(1)
    training.optimizer.zero_grad()
    training.backward(slice(2, None))
    parameter = training.parameters[1]
    (parameter * training.put(torch.full(parameter.shape, torch.inf if rank == 0 else 1.0))).sum().backward()
    with pytest.raises(hvd_saef.NonFiniteUpdateError):
        training.optimizer.step()
    training.optimizer.zero_grad()
    training.steps(1)
    return []  # how many buckets took their local step is chance


def two_streams(rank: int, on_gpu: bool, **options: Any) -> list[Tensor]:
    """The gradients of one bucket are computed in two streams."""
    training = Training(rank, on_gpu, overlap=True, bucket_bytes=1 << 20, **options)
    training.steps(1)
    training.optimizer.zero_grad()
    if on_gpu:
        for which in (slice(2, None), slice(0, 2)):
            stream = torch.cuda.Stream(GPU)
            stream.wait_stream(torch.cuda.current_stream(GPU))
            with torch.cuda.stream(stream):
                training.backward(which)
        torch.cuda.current_stream(GPU).wait_stream(stream)
    else:
        training.backward(slice(2, None))
        training.backward(slice(0, 2))
    training.optimizer.step()
    return training.x()


def timed(rank: int, on_gpu: bool, **options: Any) -> list[Tensor]:
    """The times of a step, before anything else waits for it."""
    training = Training(rank, on_gpu, **options)
    training.steps(1)
    training.optimizer._saef.statistics.as_dict()
    return training.x()


GLOO, NCCL, THREADS = "gloo", "cpu:gloo,cuda:nccl", "threads"
Scenario = tuple[Callable[..., list[Tensor]], int, str, dict[str, Any]]
NODES = [[0, 1], [2, 3]]
SCENARIOS: dict[str, Scenario] = {
    "sharded": (rounds, 2, GLOO, {}),
    "single-way": (rounds, 2, GLOO, {"double_compression": False}),
    "server step ahead": (rounds, 2, GLOO, {"server_step_ahead": 1.0}),
    "one bucket": (rounds, 2, GLOO, {"bucket_bytes": 1 << 20}),
    "overlap": (rounds, 2, GLOO, {"overlap": True}),
    "averaging": (rounds, 2, GLOO, {"averaging_period": 2}),
    "dense": (rounds, 2, GLOO, {"compression": Compression.none}),
    "nodes": (rounds, 4, GLOO, {"worker": NODES}),
    "nodes, overlap": (rounds, 4, GLOO, {"worker": NODES, "overlap": True}),
    "NCCL": (rounds, 2, NCCL, {}),
    "NCCL, overlap, averaging": (rounds, 2, NCCL, {"overlap": True, "averaging_period": 2}),
    "threads": (rounds, 2, THREADS, {"overlap": True, "averaging_period": 2}),
    "looks between": (looks_between, 2, GLOO, {}),
    "abandoned": (abandoned, 2, GLOO, {"server_step_ahead": 1.0}),
    "nodes, abandoned": (abandoned, 4, GLOO, {"worker": NODES}),
    "two streams": (two_streams, 2, GLOO, {}),
    "timed": (timed, 2, GLOO, {}),
}


WAITS = {
    "round/exchange.py:_take_down": "overlap",
    "round/exchange.py:abandon": "abandoned",
    "round/exchange.py:wait_until_encoded": "looks between",
    "round/overlap.py:_leave": "two streams",
    "round/overlap.py:_take_means": "nodes, overlap",
    "round/overlap.py:abandon": "nodes, abandoned",
    "round/statistics.py:_add_seconds": "timed",
    "round/team_means.py:take": "nodes",
    "round/trip.py:gather": "overlap",
    "round/trip.py:land": "single-way",
    "round/trip.py:serve": "sharded",
    "transport/background.py:in_own_stream": "overlap",
    "transport/staging.py:ready": "one bucket",
    "transport/threads.py:_shared": "threads",
}
"""Where the library waits, and the scenario in which something comes too early without that."""


def run(name: str, without: str = "") -> tuple[Recorder, list[list[Tensor]]]:
    """What was recorded in a scenario, and x of each rank."""
    function, ranks, backend, options = SCENARIOS[name]

    def work(rank: int) -> list[Tensor]:
        return function(rank, True, **options)

    with kernels.only("twins"), stand_in(without) as recorder:
        found = run_workers(ranks, work) if backend == THREADS else run_pretended(ranks, backend, work)
    return recorder, found


@cache
def as_it_is(name: str) -> tuple[Recorder, list[list[Tensor]]]:
    """The scenario with all waits, run once."""
    return run(name)


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_use_comes_after_what_it_needs(name: str) -> None:
    recorder, found = as_it_is(name)
    assert len(recorder.log) > 10
    assert not recorder.complaints, recorder.complaints[:5]
    function, ranks, _, options = SCENARIOS[name]
    with kernels.only("twins"):
        wanted = run_workers(ranks, lambda rank: function(rank, False, **options)) if found[0] else []
    for ours, theirs in zip(found, wanted, strict=bool(wanted)):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("site", WAITS)
def test_without_a_wait_something_comes_too_early(site: str) -> None:
    assert site in as_it_is(WAITS[site])[0].sites
    if site == "round/statistics.py:_add_seconds":
        with pytest.raises(RuntimeError, match="be over"):
            run(WAITS[site], without=site)
    else:
        assert run(WAITS[site], without=site)[0].complaints


def test_there_is_no_other_wait() -> None:
    seen = set().union(*(as_it_is(name)[0].sites for name in SCENARIOS))
    assert seen == set(WAITS)
    written = set()
    for file in PACKAGE.rglob("*.py"):
        relative = str(file.relative_to(PACKAGE))
        if relative != "transport/streams.py":
            written |= {f"{relative}:{name}" for name in waiting(ast.parse(file.read_text()))}
    for_others = {
        "transport/background.py:take",
        "round/statistics.py:phase",
    }  # the second one waits for none
    assert written - for_others == set(WAITS)


def waiting(tree: ast.AST) -> set[str]:
    """The innermost functions that wait for a moment of a device, or hand on that of another thread."""
    found: set[str] = set()

    def look(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.FunctionDef):
            name = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = ast.unparse(node)
            if called.endswith((".result().take()", ".order()", ".so_far().wait()", "end.since(start)")):
                found.add(name)
            if "sources.join(" in called:
                found.add(name)
        for child in ast.iter_child_nodes(node):
            look(child, name)

    look(tree, "")
    return found


# -- devices, memory ------------------------------------------------------------------------------


def test_threads_of_the_background_have_the_device_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter-test of what tests/pretended.py looks at in all scenarios."""
    monkeypatch.setattr(streams._GpuWork, "within", lambda self, stream: torch.cuda.stream(stream))
    complaints = run("sharded")[0].complaints
    for what in ("device 0 in hvd_saef UP", "device 0 in hvd_saef DOWN"):
        assert any(what in one for one in complaints), complaints[:5]


def test_memory_is_allocated_once() -> None:
    def fn(rank: int) -> None:
        training = Training(rank, True, overlap=True)
        training.steps(2)
        training.optimizer._saef.communicator.combine(0)
        counted = cuda.CURRENT.buffers, len(cuda.CURRENT.pinned)
        assert min(counted) > 0
        training.optimizer._saef.communicator.combine(0)
        training.steps(3)
        assert (cuda.CURRENT.buffers, len(cuda.CURRENT.pinned)) == counted

    with kernels.only("twins"), stand_in():
        run_pretended(2, GLOO, fn)


def test_an_mpi_that_is_cuda_aware_waits_for_what_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_SAEF_CUDA_AWARE_MPI", "1")
    for waits in (True, False):
        with stand_in() as recorder:
            payload = recorder.to_gpu(torch.zeros(4, dtype=torch.uint8)).add_(1)
            channel = Staging(reaches_mpi)
            assert channel.direct(GPU)
            if waits:
                channel.ready(GPU)
            recorder.on_host("MPI", [payload], reaches=True)
            assert bool(recorder.complaints) is not waits
            pieces = channel.leaving([payload, payload])  # in several messages
            recorder.on_host("MPI", pieces, reaches=True)
            assert all(isinstance(piece, OnGpu) for piece in pieces)
            assert bool(recorder.complaints) is not waits


# -- times, graphs --------------------------------------------------------------------------------


def test_seconds_are_those_of_the_device() -> None:
    statistics = Statistics()
    with stand_in() as recorder:
        numbers = recorder.to_gpu(torch.zeros(4))
        for _ in range(3):
            with statistics.phase("encode", GPU):
                numbers.add_(1)
        with statistics.phase("agreement"):
            pass
        assert statistics.seconds["encode"] == 0  # nobody has waited
        assert statistics.as_dict()["seconds_encode"] == 3 * cuda.SECONDS
        assert statistics.as_dict()["seconds_encode"] == 3 * cuda.SECONDS
        assert 0 < statistics.as_dict()["seconds_agreement"] < cuda.SECONDS


@pytest.mark.parametrize("overlap", [False, True])
def test_capturing_a_step_is_refused(overlap: bool) -> None:
    def fn(rank: int) -> None:
        training = Training(rank, True, overlap=overlap)
        training.steps(2)
        before = training.x()
        training.optimizer._saef.communicator.combine(0)  # all ranks begin together, and end so
        cuda.CURRENT.captured = True
        if overlap:
            with pytest.raises(RuntimeError, match=r"backward, during which .* CUDA graph.*overlap=False"):
                training.backward()
        else:
            training.backward()
        for call in ("step", "flush", "consolidate", "reanchor"):
            named = "flush" if call == "consolidate" else call
            with pytest.raises(RuntimeError, match=rf"{named}\(\) cannot be captured into a CUDA graph"):
                getattr(training.optimizer, call)()
        training.optimizer._saef.communicator.combine(0)
        cuda.CURRENT.captured = False
        training.optimizer.zero_grad()
        assert all(torch.equal(one, other) for one, other in zip(training.x(), before, strict=True))
        training.steps(1)

    with kernels.only("twins"), stand_in():
        run_pretended(2, GLOO, fn)
