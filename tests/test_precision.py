"""Mixed precision: autocast with a GradScaler, fused optimizers, and parameters of 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef import Compression
from tests.older_torch import needs_optimizer
from tests.workers import NO_MODEL, Run, batch, bits, everything, network, sgd, together

pytestmark = [
    pytest.mark.both_arithmetics,
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
]

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
DENSE: dict[str, Any] = {"compression": Compression.none, "feedback": "none"}
SETTINGS: dict[str, dict[str, Any]] = {
    "sign": {},
    "topk, two local steps": {"compression": Compression.topk(0.2), "local_steps": 2},
    "dense": DENSE,
}
SCALE = 1024.0
OVERFLOW = 3  # the step at which it happens, on the last worker

MAKES: dict[str, Make] = {  # eps=1: so that Adam, too, tells one scale from another
    "SGD": sgd,
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.05, eps=1.0, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.05, eps=1.0, foreach=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.05, eps=1.0, fused=True),
}
CASES = [
    pytest.param(make, marks=needs_optimizer(name.split()[0], fused="fused" in name), id=name)
    for name, make in MAKES.items()
]


class Amp:
    """One worker's training under autocast, as users write it."""

    def __init__(self, rank: int, dtype: torch.dtype, scale: float, make: Make = sgd, **options: Any) -> None:
        self.rank, self.dtype = rank, dtype
        self.model = network()
        base = make(list(self.model.parameters()))
        named = self.model.named_parameters()
        self.optimizer = hvd_saef.DistributedOptimizer(base, named, model=self.model, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 0)

    def backward(self, step: int, factor: float = 1.0) -> None:
        """Forward and backward; the loss times `factor`."""
        self.optimizer.zero_grad()
        inputs = batch(self.rank, step)
        with torch.autocast("cpu", dtype=self.dtype):
            out = self.model(inputs)
            assert out.dtype == self.dtype
            loss = ((out.float() - inputs[:, :2].cos()) ** 2).mean()
        torch.autograd.backward(self.scaler.scale(loss * factor))

    def step(self, clip: float | None = None, recipe: bool = False) -> None:
        """With clipping as torch's docs have it, or as Horovod's have it."""
        if recipe:
            self.optimizer.synchronize()
        if clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        if recipe:
            with self.optimizer.skip_synchronize():
                self.scaler.step(self.optimizer)
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()

    def bits(self) -> dict[str, bytes]:
        """Of parameters and of everything in the state dict."""
        return bits([dict(self.model.named_parameters()), self.optimizer.state_dict()])


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_an_overflow_on_one_worker_is_skipped_on_all(
    options: dict[str, Any], dtype: torch.dtype, workers: int, clip: float | None
) -> None:
    """Training goes on as if the step had not been there, though scales differ from then on."""

    def fn(rank: int, overflow: bool) -> dict[str, bytes]:
        amp = Amp(rank, dtype, SCALE, **options)
        for step in range(7):
            if step != OVERFLOW:
                amp.backward(step)
                before = amp.bits()
                amp.step(clip)
                assert amp.bits() != before
            elif overflow:
                amp.backward(step, math.inf if rank == workers - 1 else 1.0)
                before = amp.bits()
                amp.step(clip)
                assert amp.bits() == before
        assert amp.optimizer.stats()["skipped"] == int(overflow)
        assert amp.scaler.get_scale() == (SCALE / 2 if overflow and rank == workers - 1 else SCALE)
        return amp.bits()

    assert together(workers, lambda rank: fn(rank, True)) == together(workers, lambda rank: fn(rank, False))


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    ("workers", "clip", "recipe"),
    [(2, None, False), (2, 0.2, False), (2, 0.2, True), (1, None, False), (4, 0.2, True)],
)
def test_gradients_are_unscaled_once(
    make: Make, options: dict[str, Any], workers: int, clip: float | None, recipe: bool
) -> None:
    """Scales are powers of two: with and without a scaler it is the same, to the bit."""

    def fn(rank: int, scale: float) -> dict[str, bytes]:
        amp = Amp(rank, torch.bfloat16, scale, make, **options)
        for step in range(4):
            amp.backward(step)
            if clip is not None:
                gradients = [p.grad.view(-1) for p in amp.model.parameters() if p.grad is not None]
                assert torch.cat(gradients).norm() > clip * (scale or 1.0)
            amp.step(clip, recipe)
        return amp.bits()

    assert together(workers, lambda rank: fn(rank, SCALE)) == together(workers, lambda rank: fn(rank, 0))


@pytest.mark.parametrize("make", CASES)
def test_a_second_unscaling_would_be_seen(make: Make) -> None:
    """The counter-test: every one of these optimizers tells scales apart."""

    def fn(rank: int, factor: float) -> dict[str, bytes]:
        amp = Amp(rank, torch.bfloat16, 0, make)
        amp.backward(0, factor)
        amp.step()
        return amp.bits()

    alone = together(1, lambda rank: fn(rank, 1.0))
    assert alone != together(1, lambda rank: fn(rank, SCALE))
    assert alone != together(1, lambda rank: fn(rank, 1 / SCALE))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_with_horovods_recipe_and_averaged_gradients_all_see_the_overflow(workers: int) -> None:
    """As with Horovod: the infinity is averaged before it is looked for, and scales stay alike."""

    def fn(rank: int) -> tuple[float, dict[str, bytes]]:
        amp = Amp(rank, torch.bfloat16, SCALE, **DENSE)
        for step in range(6):
            amp.backward(step, math.inf if (step, rank) == (OVERFLOW, 0) else 1.0)
            before = amp.bits()
            amp.step(0.2, recipe=True)
            assert (amp.bits() == before) is (step == OVERFLOW)
        return amp.scaler.get_scale(), bits(dict(amp.model.named_parameters()))

    results = together(workers, fn)
    assert {scale for scale, _ in results} == {SCALE / 2}
    assert all(parameters == results[0][1] for _, parameters in results)


# -- parameters of 16 bits ------------------------------------------------------------------------------

NARROW = [torch.bfloat16, torch.float16]
LOST = pytest.mark.xfail(strict=True, reason="the wrapped optimizer's step rounds y to b, as unwrapped")


def one(dtype: torch.dtype, value: float, make: Make | None = None, **options: Any) -> tuple[Tensor, Any]:
    """A parameter of 64 equal elements, and its wrapped optimizer."""
    parameter = nn.Parameter(torch.full((64,), value, dtype=dtype))
    base = (make or (lambda p: torch.optim.SGD(p, lr=1.0)))([parameter])
    return parameter, hvd_saef.DistributedOptimizer(base, **options)


def x_of(optimizer: Any) -> Tensor:
    """The consensus point of the only parameter."""
    x: Tensor = optimizer.state_dict()["hvd_saef"]["x"]["noname.0.0"]
    return x


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("feedback", ["saef", "ef"])
def test_means_that_the_parameters_cannot_hold_arrive(
    dtype: torch.dtype, feedback: Any, workers: int
) -> None:
    """One worker moves by the smallest step that the dtype has; the mean is a K-th of that.

    After 200 steps x is where a float32 run has it; an x of 16 bits would hardly have moved.
    """
    ulp = torch.finfo(dtype).eps

    def fn(rank: int, dtype: torch.dtype) -> Tensor:
        parameter, optimizer = one(dtype, 2 - ulp, compression=Compression.none, feedback=feedback)
        for _ in range(200):
            parameter.grad = torch.full_like(parameter, ulp if rank == 0 else 0.0)
            optimizer.step()
            assert x_of(optimizer).dtype == torch.float32
            assert torch.equal(parameter, x_of(optimizer).to(dtype))
        return x_of(optimizer)

    for narrow, wide in zip(
        together(workers, lambda rank: fn(rank, dtype)),
        together(workers, lambda rank: fn(rank, torch.float32)),
        strict=True,
    ):
        assert torch.equal(narrow, wide)
        assert torch.equal(narrow, torch.full((64,), 2 - ulp - 200 * ulp / workers))
    alone = torch.tensor(2 - ulp, dtype=dtype)
    for _ in range(200):
        alone -= ulp / workers
    assert alone >= 2 - 2 * ulp


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("compression", [Compression.sign, Compression.topk(0.1)], ids=str)
def test_what_the_local_steps_do_arrives(
    dtype: torch.dtype, compression: hvd_saef.Compressor, workers: int
) -> None:
    """The sum of 200 steps' b - y is in x, e and s, all float32; the parameters are b, rounded."""

    def fn(rank: int) -> tuple[Tensor, Tensor, Tensor, tuple[int, Tensor]]:
        generator = torch.Generator().manual_seed(rank)
        parameter, optimizer = one(dtype, 1.5, compression=compression)
        ends: list[Tensor] = []
        optimizer.register_step_post_hook(lambda *_: ends.append(parameter.detach().double()))
        total = torch.zeros(64, dtype=torch.float64)
        for _ in range(200):
            parameter.grad = (torch.randn(64, generator=generator) * 0.02 + 0.005).to(dtype)
            b = parameter.detach().double()
            optimizer.step()
            total += b - ends.pop()
            ours = optimizer.state_dict()["hvd_saef"]
            x, e = ours["x"]["noname.0.0"], ours["errors"]["noname.0.0"]
            assert (x.dtype, e.dtype) == (torch.float32, torch.float32)
            assert torch.equal(parameter, (x - e).to(dtype))
        piece = ours["server_errors"].get("noname.0.0", {"start": 0, "values": torch.zeros(0)})
        assert piece["values"].dtype == torch.float32
        return total, x.double(), e.double(), (piece["start"], piece["values"].double())

    results = together(workers, fn)
    s = torch.zeros(64, dtype=torch.float64)
    for *_, (start, values) in results:
        s[start : start + values.numel()] = values
    total = torch.stack([moved for moved, *_ in results]).mean(0)
    e = torch.stack([error for _, _, error, _ in results]).mean(0)
    torch.testing.assert_close(results[0][1] - s - e, 1.5 - total, rtol=0, atol=1e-4)
    assert total.abs().min() > 0.1


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("dtype", [*(pytest.param(d, marks=LOST) for d in NARROW), torch.float32], ids=str)
def test_updates_that_are_tiny_on_every_worker_arrive(dtype: torch.dtype, workers: int) -> None:
    """Not with 16 bits: the wrapped optimizer steps the parameters themselves, which rounds y to b."""

    def fn(rank: int) -> None:
        parameter, optimizer = one(dtype, 1.5, compression=Compression.none)
        for _ in range(200):
            parameter.grad = torch.full_like(parameter, 2.0**-13)
            optimizer.step()
        torch.testing.assert_close(x_of(optimizer), torch.full((64,), 1.5 - 200 * 2.0**-13))

    together(workers, fn)


def test_a_disabled_scaler_changes_nothing() -> None:
    def fn(rank: int, scaled: bool) -> dict[str, bytes]:
        run, scaler = Run(rank), torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(4):
            run.set_gradients()
            if scaled:
                scaler.unscale_(run.optimizer)
                scaler.step(run.optimizer)
                scaler.update()
            else:
                run.optimizer.step()
            run.taken += 1
        return everything(run)

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))
