"""Numbers that overflow after the gradients were looked at: seen by all, before x is touched."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef import Compression, NonFiniteUpdateError, WorkerError
from tests.workers import NO_MODEL, Run, bits, caught, everything, sgd, together

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
]

DENSE: dict[str, Any] = {"compression": Compression.none, "feedback": "none"}
FP16: dict[str, Any] = {"compression": Compression.fp16}
SETTINGS: dict[str, dict[str, Any]] = {
    "sign": {},
    "replicated": {"server": "replicated"},
    "single": {"double_compression": False},
    "topk": {"compression": Compression.topk(0.2), "averaging_period": 2},
    "none": {"compression": Compression.none},
    "fp16": FP16,
    "many buckets": {"bucket_bytes": 16},
}


def ours(run: Run) -> dict[str, bytes]:
    """The bits of the parameters, x, and all errors; and the rounds."""
    return bits({"parameters": run.parameters, "ours": run.optimizer.state_dict()["hvd_saef"]})


def finite(run: Run) -> bool:
    """Whether all that :func:`ours` tells is."""
    state = run.optimizer.state_dict()["hvd_saef"]
    tensors = [*run.parameters, *state["x"].values(), *state["errors"].values()]
    tensors += [piece["values"] for piece in state["server_errors"].values()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def explode(run: Run, rate: float) -> None:
    """A step whose gradients are finite, and whose learning rate makes an end of that on rank 1."""
    (group,) = run.optimizer.param_groups
    before = group["lr"]
    group["lr"] = rate if run.rank == 1 else before
    try:
        run.step()
    finally:
        group["lr"] = before


@pytest.mark.parametrize("rate", [math.inf, math.nan, 1e38, 1e25], ids=str)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_an_update_that_overflows_is_seen_before_x_is_touched(options: dict[str, Any], rate: float) -> None:
    def fn(rank: int) -> None:
        run = Run(rank, **options).step(3)
        before = ours(run)
        with pytest.raises(
            NonFiniteUpdateError, match=r"'noname\.0\.\d' on rank 1\. x and the errors are as"
        ):
            explode(run, rate)
        assert ours(run) == before
        run.step(2)
        assert finite(run)
        x = bits(run.x())
        raise LookupError(str(x))

    one, other = caught(2, fn)
    assert isinstance(one, LookupError), one
    assert str(one) == str(other)  # x is the same on both


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_or_skipped_with_a_counter(options: dict[str, Any]) -> None:
    def fn(rank: int) -> None:
        run = Run(rank, **options, on_nonfinite="skip").step(3)
        before = ours(run)
        explode(run, math.inf)
        assert ours(run) == before
        assert run.optimizer.stats()["skipped"] == 1
        assert run.optimizer.stats()["rounds"] == 3
        assert finite(run.step(2))

    together(3, fn)


def test_between_local_steps_the_round_begins_anew() -> None:
    def fn(rank: int) -> None:
        run = Run(rank, local_steps=3).step(3)
        before = ours(run)
        run.step(2)
        with pytest.raises(NonFiniteUpdateError):
            explode(run, math.inf)
        assert ours(run) == before
        run.step(3)
        assert run.optimizer.stats()["rounds"] == 2

    together(2, fn)


def test_with_overlap_x_is_as_before() -> None:
    start = nn.Linear(3, 2)

    def fn(rank: int) -> None:
        model = copy.deepcopy(start)
        optimizer = hvd_saef.DistributedOptimizer(
            sgd(list(model.parameters())), model.named_parameters(), model=model, overlap=True, bucket_bytes=8
        )
        for step in range(4):
            before = bits(dict(model.state_dict()))
            model.train()
            optimizer.zero_grad()
            if (step, rank) == (3, 1):
                optimizer.param_groups[0]["lr"] = math.inf
            model(torch.ones(4, 3) + rank).square().sum().backward()
            if step < 3:
                optimizer.step()
                continue
            with pytest.raises(NonFiniteUpdateError, match="on rank 1"):
                optimizer.step()
            assert bits(dict(model.state_dict())) == before

    together(2, fn)


@pytest.mark.parametrize("value", [3e38, 1e21], ids=str)
@pytest.mark.parametrize("skip", [False, True])
def test_gradients_whose_squares_overflow_leave_the_optimizer_as_it_was(value: float, skip: bool) -> None:
    """Adam would keep an infinity for ever, and never move that parameter again."""

    def fn(rank: int) -> None:
        run = Run(rank, lambda p: torch.optim.Adam(p, lr=0.01), on_nonfinite="skip" if skip else "raise")
        run.step(2)
        before = everything(run)
        run.set_gradients()
        gradient = run.parameters[0].grad
        assert gradient is not None
        gradient[2, 3] = value if rank == 1 else 1.0
        if skip:
            run.optimizer.step()
            assert run.optimizer.stats()["skipped"] == 1
        else:
            with pytest.raises(NonFiniteUpdateError, match=r"in its own state.*so is the optimizer's own"):
                run.optimizer.step()
        assert everything(run) == before
        run.step(2)
        raise LookupError(str(bits(run.x())))

    assert len({str(failure) for failure in caught(2, fn)}) == 1


@pytest.mark.parametrize("value", [60000.0, 65504.0, 1e6], ids=str)
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("warmup", [0, 3])
def test_sums_in_float16_do_not_overflow_and_nothing_is_lost(value: float, workers: int, warmup: int) -> None:
    """What does not fit travels later: x̃ = x - mean e has moved by the mean update."""

    def fn(rank: int) -> tuple[Tensor, Tensor]:
        parameter = nn.Parameter(torch.zeros(8))
        optimizer = hvd_saef.DistributedOptimizer(
            torch.optim.SGD([parameter], lr=1.0), compression=Compression.fp16, warmup_steps=warmup
        )
        for _ in range(3):
            parameter.grad = torch.full((8,), value)
            optimizer.step()
        state = optimizer.state_dict()["hvd_saef"]
        served = [piece["values"] for piece in state["server_errors"].values()]
        assert all(bool(values.isfinite().all()) for values in served)  # C would send what fits of infinity
        return state["x"]["noname.0.0"], state["errors"]["noname.0.0"]

    results = together(workers, fn)
    x = results[0][0]
    assert bool(x.isfinite().all())
    error = torch.stack([e for _, e in results]).mean(0)
    torch.testing.assert_close(x - error, torch.full((8,), -3 * value), rtol=1e-3, atol=0)
    assert all(torch.equal(x, other) for other, _ in results)


@pytest.mark.parametrize("skip", [False, True])
def test_gradients_whose_sum_overflows_in_float16(skip: bool) -> None:
    def fn(rank: int) -> None:
        run = Run(
            rank, feedback="none", on_nonfinite="skip" if skip else "raise", compression=Compression.fp16
        ).step(2)
        before = everything(run)
        run.set_gradients()
        run.parameters[0].grad = torch.full_like(run.parameters[0], 50000.0)
        if skip:
            run.optimizer.step()
            assert run.optimizer.stats()["skipped"] == 1
        else:
            with pytest.raises(NonFiniteUpdateError, match="sum of all workers' gradients overflowed"):
                run.optimizer.step()
        assert everything(run) == before
        run.step(2)

    together(2, fn)


def test_parameters_of_16_bits_that_overflow() -> None:
    def fn(rank: int) -> None:
        parameter = nn.Parameter(torch.full((5,), 60000.0, dtype=torch.float16))
        optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD([parameter], lr=1.0))
        parameter.grad = torch.full_like(parameter, -10000.0 if rank == 1 else 1.0)
        before = parameter.detach().clone()
        with pytest.raises(NonFiniteUpdateError, match="on rank 1"):
            optimizer.step()
        assert torch.equal(parameter, before)

    together(2, fn)


def test_an_exception_in_the_local_step() -> None:
    """All raise in the same step, and can go on."""

    class Breaking(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            """As SGD's, unless it fails."""
            if self.fails:
                raise MemoryError("no room")
            return super().step(closure)

    def fn(rank: int) -> None:
        run = Run(rank, lambda p: Breaking(p, lr=0.05)).step(2)
        before = ours(run)
        run.optimizer.fails = rank == 1
        with pytest.raises(MemoryError if rank == 1 else WorkerError, match="no room"):
            run.step()
        run.optimizer.fails = False
        assert ours(run) == before
        run.step(2)

    together(3, fn)
