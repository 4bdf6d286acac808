"""Workers that are threads with one device: whole steps, streams, mixed precision, memory, checkpoints."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hvd_saef
from benchmarks.gpu.pieces import Place
from benchmarks.models import SHAPES
from hvd_saef import Compression, Compressor, kernels
from hvd_saef.compression import Blocks
from tests.gpu.registry import Lacking, best, check, needs_memory
from tests.oracle import Setup, run
from tests.problems import Outcome, curved_valley, run_library, same_bits, start_point, worst
from tests.problems import schedule as decaying
from tests.workers import adamw, batch, bits, network, sgd, together

CPU = torch.device("cpu")
TOLERANCE = 1e-10
SETUPS: list[tuple[dict[str, Any], str]] = [
    ({}, "replicated"),
    ({"block_size": 17}, "sharded"),
    ({"compressor": "topk", "local_steps": 2}, "sharded"),
    ({"server_step_ahead": 1.0, "step_ahead": 0.5}, "replicated"),
    ({"double_compression": False, "feedback": "ef"}, "auto"),
    ({"compressor": "topk", "double_compression": False}, "auto"),
]
REDUCED: list[tuple[dict[str, Any], str]] = [
    ({"averaging_period": 2}, "sharded"),
    ({"compressor": "topk", "warmup_steps": 1}, "sharded"),
    ({"compressor": "none"}, "auto"),
]
"""With means of floats."""


def setups(place: Place, with_means: bool = False) -> list[tuple[dict[str, Any], str]]:
    """As many as there is time for."""
    every = SETUPS + (REDUCED if with_means else [])
    return every[2:3] if place.tiny else every


def wanted(workers: int, settings: dict[str, Any], **others: Any) -> Setup:
    """An oracle's setup; sign, if the settings do not say otherwise."""
    every: dict[str, Any] = {"workers": workers, "compressor": "sign", **others, **settings}
    return Setup(**every)


def trained(setup: Setup, devices: list[torch.device], steps: int, **options: Any) -> list[Outcome]:
    """What the library comes to, with each worker on its device."""

    def fn(rank: int) -> Outcome:
        def place(number: int, start: Tensor) -> Tensor:
            return start.to(devices[rank])

        return run_library(setup, rank, start_point(), steps=steps, place=place, **options)

    return together(len(devices), fn)


def exact(step: int) -> float:
    """A rate with which SGD rounds alike on all devices, fused or not: a power of two."""
    return 2.0**-4 if step < 4 else 2.0**-6


@check("workers")
def the_oracle(place: Place) -> None:
    """With momentum, in float64, to 1e-10."""
    steps, workers = (3, 2) if place.tiny else (12, 3)
    for settings, server in setups(place, with_means=True):
        setup = wanted(workers, settings, optimizer="sgdm", lr=decaying)
        truth = run(setup, start_point(), curved_valley, steps)
        with kernels.only(best(place)):
            outcomes = trained(setup, workers * [place.device], steps, server=server)
        for k, outcome in enumerate(outcomes):
            assert worst(outcome.x, truth.x) <= TOLERANCE, settings
            assert worst(outcome.errors, truth.errors[k]) <= TOLERANCE, settings
            assert worst(outcome.parameters, truth.parameters[k]) <= TOLERANCE, settings


@check("workers")
def the_bits_of_the_cpu(place: Place) -> None:
    """All workers on the device, or the first alone: the bits of workers on the CPU without kernels."""
    steps, workers = (2, 2) if place.tiny else (8, 3)
    dtypes = (torch.float32,) if place.tiny else (torch.float32, torch.float64)
    for (settings, server), dtype in itertools.product(setups(place), dtypes):
        setup = wanted(workers, settings, lr=exact)
        with kernels.only("twins"):
            expected = trained(setup, workers * [CPU], steps, server=server, dtype=dtype)
        with kernels.only(best(place)):
            found = trained(setup, workers * [place.device], steps, server=server, dtype=dtype)
        mixed = trained(setup, [place.device, *(workers - 1) * [CPU]], steps, server=server, dtype=dtype)
        for outcomes in (found, mixed):
            for one, other in zip(outcomes, expected, strict=True):
                assert same_bits(one.x, other.x), settings
                assert same_bits(one.errors, other.errors), settings
                assert same_bits(one.parameters, other.parameters), settings


class Training:
    """One worker's model on the device, and steps on data of its own, as users write them."""

    def __init__(
        self, place: Place, rank: int, make: Any = sgd, dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        self.rank, self.device, self.taken = rank, place.device, 0
        self.model = network(dtype).to(place.device)
        base = make(list(self.model.parameters()))
        self.optimizer: Any = hvd_saef.DistributedOptimizer(
            base, self.model.named_parameters(), model=self.model, **options
        )

    def loss(self, dtype: torch.dtype | None = None) -> Tensor:
        """Of the next batch, under autocast to a dtype."""
        inputs = batch(self.rank, self.taken).to(self.device)
        self.taken += 1
        cast = torch.autocast(self.device.type, dtype=dtype) if dtype else contextlib.nullcontext()
        with cast:
            out = self.model(inputs.to(next(self.model.parameters()).dtype) if dtype is None else inputs)
        loss: Tensor = ((out.float() - inputs[:, :2].cos()) ** 2).mean()
        return loss

    def step(self, times: int = 1) -> Training:
        """Some steps."""
        for _ in range(times):
            self.optimizer.zero_grad()
            torch.autograd.backward(self.loss())
            self.optimizer.step()
        return self

    def everything(self) -> dict[str, bytes]:
        """Of parameters and of the state dict."""
        return bits([dict(self.model.named_parameters()), self.optimizer.state_dict()])


OPTIONS: dict[str, dict[str, Any]] = {
    "sign": {},
    "Top-K, two local steps": {"compression": Compression.topk(0.2), "local_steps": 2},
    "β = 1": {"server_step_ahead": 1.0},
    "overlap": {"overlap": True},
}


MAKES: dict[torch.dtype, Any] = {torch.float32: adamw, torch.bfloat16: adamw, torch.float16: sgd}
"""The optimizers of parameters of these dtypes; Adam's eps is 0 in float16."""


@check("workers")
def kernels_and_twins_alike(place: Place) -> None:
    """On the device both do the same, also for parameters of 16 bits and with AdamW."""
    some = list(OPTIONS.values())[: 1 if place.tiny else None]
    for options, (dtype, make) in itertools.product(some, MAKES.items()):

        def fn(rank: int, options: Any = options, dtype: torch.dtype = dtype, make: Any = make) -> Any:
            return Training(place, rank, make, dtype, **options).step(2 if place.tiny else 5).everything()

        found = []
        for version in (best(place), "twins"):
            with kernels.only(version):
                found.append(together(2, fn))
        assert found[0] == found[1], (options, dtype)


@check("workers")
def overlap_has_the_same_bits(place: Place) -> None:
    def fn(rank: int) -> list[dict[str, bytes]]:
        return [
            Training(place, rank, overlap=overlap).step(2 if place.tiny else 10).everything()
            for overlap in (False, True)
        ]

    with kernels.only(best(place)):
        for plain, overlapped in together(2, fn):
            assert plain == overlapped


@check("streams")
def a_stream_of_the_users_own(place: Place) -> None:
    """With each worker in a stream of its own, whose work is late: the bits of the default stream."""

    def fn(rank: int, apart: bool) -> dict[str, bytes]:
        training = Training(place, rank, bucket_bytes=64)
        for _ in range(2 if place.tiny else 8):
            training.optimizer.zero_grad()
            with late(place) if apart else contextlib.nullcontext():
                torch.autograd.backward(training.loss())
                training.optimizer.step()
        place.wait()
        return training.everything()

    with kernels.only(best(place)):
        assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


@contextlib.contextmanager
def late(place: Place, cycles: int = 20_000_000) -> Iterator[None]:
    """A stream that has some milliseconds of other work to do before."""
    if not place.on_gpu:
        yield
        return
    stream = torch.cuda.Stream(place.device)
    stream.wait_stream(torch.cuda.current_stream(place.device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(cycles)
        yield
        torch.cuda._sleep(cycles)
    torch.cuda.current_stream(place.device).wait_stream(stream)


@check("streams")
def another_gpu_than_the_current_one(place: Place) -> None:
    """Background threads set the device, too."""
    if torch.cuda.device_count() < 2:
        raise Lacking("a second GPU")
    other = Place(torch.device("cuda", 1), place.tiny)

    def fn(where: Place) -> list[dict[str, bytes]]:
        return together(2, lambda rank: Training(where, rank, overlap=True).step(3).everything())

    first, second = fn(place), fn(other)
    assert first == second
    with torch.cuda.device(0):
        assert fn(other) == first


@check("streams")
def a_captured_graph_is_refused(place: Place) -> None:
    """A step cannot be captured: it talks to other workers."""
    if not place.on_gpu:
        raise Lacking("a GPU")

    def fn(rank: int) -> str:
        training = Training(place, rank).step(2)
        torch.autograd.backward(training.loss())
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                training.optimizer.step()
        except Exception as error:
            return str(error)
        return "a step was captured"

    (said,) = together(1, fn)
    assert "graph" in said.lower(), said


@check("amp")
def an_overflow_is_skipped_on_all(place: Place) -> None:
    """Autocast to float16 with GradScaler: one worker's infinite gradient skips the step on all workers."""

    def fn(rank: int, overflow: bool) -> dict[str, bytes]:
        training = Training(place, rank)
        scaler = torch.amp.GradScaler(place.device.type, init_scale=1024.0)
        for step in range(4):
            if step == 2 and not overflow:
                training.taken += 1
                continue
            training.optimizer.zero_grad()
            factor = math.inf if step == 2 and rank == 1 else 1.0
            torch.autograd.backward(scaler.scale(training.loss(torch.float16) * factor))
            scaler.unscale_(training.optimizer)
            nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
            before = training.everything()
            scaler.step(training.optimizer)
            scaler.update()
            assert (training.everything() == before) is (step == 2)
        assert scaler.get_scale() == (512.0 if overflow and rank == 1 else 1024.0)
        assert training.optimizer.stats()["skipped"] == int(overflow)
        return training.everything()

    with kernels.only(best(place)):
        assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


@check("amp")
def bfloat16_needs_no_scaler(place: Place) -> None:
    """Autocast to bfloat16: x has the same bits on both workers, and the loss falls."""

    def fn(rank: int) -> tuple[dict[str, bytes], float, float]:
        training = Training(place, rank)
        losses = []
        for _ in range(4 if place.tiny else 60):
            training.optimizer.zero_grad()
            loss = training.loss(torch.bfloat16)
            losses.append(float(loss.detach()))
            torch.autograd.backward(loss)
            training.optimizer.step()
        few = max(1, len(losses) // 6)
        return bits(training.optimizer.state_dict()["hvd_saef"]["x"]), sum(losses[:few]), sum(losses[-few:])

    with kernels.only(best(place)):
        (x, first, last), (other, _, _) = together(2, fn)
    assert x == other
    assert last < first


@check("memory")
def bytes_beyond_the_state(place: Place) -> None:
    """Beyond x, e and s a worker needs at most a byte a parameter and its payloads, in steps and after."""
    needs_memory(place, 8)
    sizes = [12_000, 300] if place.tiny else [math.prod(shape) for shape in SHAPES["resnet50"]()]
    numel = sum(sizes)
    for compression in (Compression.sign, Compression.topk(0.01)):
        with kernels.only(best(place)):
            ((after, peak),) = together(1, lambda rank: grown(place, sizes, compression))  # noqa: B023
        payload = compression.payload_bytes(Blocks.cut(sizes, None, torch.float32))
        most = (12 + 1) * numel + 4 * payload  # sent, gathered, answered, gathered: of all buckets
        text = f"{after / numel:.2f}, at the peak {peak / numel:.2f}, of {most / numel:.2f} bytes a parameter"
        assert 12 * numel <= after <= peak <= most, text


def grown(place: Place, sizes: list[int], compression: Compressor) -> tuple[int, int]:
    """The bytes by which one worker has grown after some steps, and at the peak of the next one."""
    parameters = [nn.Parameter(torch.ones(size, device=place.device)) for size in sizes]
    base = torch.optim.SGD(parameters, lr=2.0**-8, foreach=False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    before = held(place)
    optimizer: Any = hvd_saef.DistributedOptimizer(base, compression=compression)
    for _ in range(1 if place.tiny else 3):
        optimizer.step()
    after = held(place) - before
    if not place.on_gpu:
        return after, after
    torch.cuda.reset_peak_memory_stats(place.device)
    optimizer.step()
    place.wait()
    return after, torch.cuda.max_memory_allocated(place.device) - before


def held(place: Place) -> int:
    """The bytes of the device's tensors; on the CPU, of all that the garbage collector knows."""
    gc.collect()
    if place.on_gpu:
        return torch.cuda.memory_allocated(place.device)
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in gc.get_objects()
        if type(one) in (Tensor, nn.Parameter) and one.layout is torch.strided  # sparse ones are other tests'
    }
    return sum(storages.values())


@check("checkpoints")
def between_the_device_and_the_cpu(place: Place) -> None:
    """What is saved on one loads on the other to the bit, and goes on."""
    here = Place(CPU, place.tiny)
    for options in list(OPTIONS.values())[: 1 if place.tiny else 3]:
        for source, target in ((place, here), (here, place)):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder)

                def fn(
                    rank: int,
                    options: Any = options,
                    source: Place = source,
                    target: Place = target,
                    path: Path = path,
                ) -> None:
                    first = Training(source, rank, **options).step(3)
                    hvd_saef.save_checkpoint(path / "1", first.model, first.optimizer, taken=first.taken)
                    other = Training(target, rank, **options).step(1)
                    loaded = hvd_saef.load_checkpoint(path / "1", other.model, other.optimizer)
                    other.taken = loaded["taken"]
                    assert other.everything() == first.everything()
                    other.step(2)
                    hvd_saef.save_checkpoint(path / "2", other.model, other.optimizer, taken=other.taken)
                    again = Training(source, rank, **options)
                    hvd_saef.load_checkpoint(path / "2", again.model, again.optimizer)
                    assert again.everything() == other.everything()

                with kernels.only(""):
                    together(2, fn)
