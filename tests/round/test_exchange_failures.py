"""An exception in the middle of an exchange, on one rank: all are told in that step, and none hangs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hvd_saef
from hvd_saef.compression import BlockedTensor, Blocks, SignCompressor
from hvd_saef.diagnostics import Monitor
from hvd_saef.errors import ConfigurationMismatchError, ExchangeError, WorkerError
from tests.workers import NO_MODEL, Run, bits, caught, everything, together

pytestmark = pytest.mark.filterwarnings(NO_MODEL)


class Failing(SignCompressor):
    """A sign that raises in the n-th call of one of its methods; never, if that is 0."""

    left: dict[str, int]

    def __init__(self, where: str, call: int) -> None:
        object.__setattr__(self, "left", {where: call})

    def _count(self, where: str) -> None:
        if where in self.left:
            self.left[where] -= 1
            if self.left[where] == 0:
                raise ArithmeticError(f"no {where}")

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """As a sign's, if at all."""
        self._count("encode")
        super().encode(delta, payload)

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """As a sign's, if at all."""
        self._count("decode_add")
        super().decode_add(payload, out, weight)

    def payload_bytes(self, layout: Blocks) -> int:
        """As a sign's, if at all."""
        self._count("payload_bytes")
        return super().payload_bytes(layout)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"server": "replicated"},
    {"double_compression": False},
    {"bucket_bytes": 64},
    {"bucket_bytes": 64, "local_steps": 2},
    {"averaging_period": 2},
    {"worker": "node"},
]


def calls_of(where: str, options: dict[str, Any], ranks: int) -> int:
    """How often rank 1 calls it in its second and third rounds."""

    def fn(rank: int) -> int:
        steps = options.get("local_steps", 1)
        counted = Failing(where, 0)
        run = Run(rank, compression=counted, **options).step(steps)
        counted.left[where] = 0
        run.step(2 * steps)
        return -counted.left[where]

    return together(2, fn, ranks)[1]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("where", ["encode", "decode_add"])
@pytest.mark.parametrize("last", [False, True])
def test_all_are_told_in_that_step(where: str, options: dict[str, Any], last: bool) -> None:
    ranks, steps = 2 if "worker" in options else 1, options.get("local_steps", 1)
    call = calls_of(where, options, ranks) if last else 1

    def fn(rank: int) -> str:
        failing = Failing(where, 0)
        run = Run(rank, compression=failing, **options).step(steps)
        failing.left[where] = call if rank == 1 else 0
        with pytest.raises(ExchangeError) as raised:
            run.step(2 * steps)
        assert run.optimizer.stats()["rounds"] == (3 if last else 2)
        for use in (run.step, run.optimizer.flush, run.optimizer.consolidate):
            with pytest.raises(ExchangeError, match="reanchor"):  # and not what x has become
                use()
        run.optimizer.reanchor()
        run.step(3 * steps)
        x = bits(run.x())
        return str(raised.value) + str(x)

    told = together(2, fn, ranks)
    assert f"rank 1 raised ArithmeticError: no {where}" in told[0]
    assert "load a checkpoint" in told[0]
    assert len(set(told)) == 1


def test_the_rank_that_failed_has_the_reason() -> None:
    def fn(rank: int) -> None:
        failing = Failing("encode", 0)
        run = Run(rank, compression=failing).step()
        failing.left["encode"] = 2 if rank == 1 else 0
        run.step(4)

    failures = caught(3, fn)
    assert isinstance(failures[1].__cause__, ArithmeticError)
    assert all(isinstance(failure, ExchangeError) for failure in failures)


def test_a_checkpoint_mends_it(tmp_path: Path) -> None:
    """Loaded on all ranks; a state loaded on one is not enough, and that is said on all."""

    def fn(rank: int) -> dict[str, bytes]:
        failing = Failing("encode", 0)
        run = Run(rank, compression=failing).step(3)
        saved = copy.deepcopy(run.optimizer.state_dict())
        plain = everything(run)
        failing.left["encode"] = 1 if rank == 1 else 0
        with pytest.raises(ExchangeError):
            run.step()
        if rank == 0:
            run.optimizer.load_state_dict(copy.deepcopy(saved))
        with pytest.raises(ExchangeError if rank else WorkerError, match="earlier round"):
            run.step()
        run.optimizer.load_state_dict(saved)
        run.optimizer.flush()
        assert {k: v for k, v in everything(run).items() if "param_groups" not in k} == {
            k: v for k, v in plain.items() if "param_groups" not in k
        }
        run.taken = 3
        return everything(run.step(3))

    plain = together(2, lambda rank: everything(Run(rank, compression=Failing("encode", 0)).step(6)))
    assert together(2, fn) == plain


def test_a_broken_state_is_not_saved(tmp_path: Path) -> None:
    """It would replace the checkpoint to go on from."""

    def fn(rank: int) -> None:
        model = torch.nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
        failing = Failing("encode", 0)
        optimizer: Any = hvd_saef.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), compression=failing, model=model
        )

        def step() -> None:
            model(torch.full((4, 3), float(rank + 1))).square().sum().backward()
            optimizer.step()

        step()
        hvd_saef.save_checkpoint(tmp_path, model, optimizer, step=1)
        failing.left["encode"] = 1 if rank == 1 else 0
        with pytest.raises(ExchangeError):
            step()
        with pytest.raises(hvd_saef.CheckpointError, match="exchange of an earlier round failed"):
            hvd_saef.save_checkpoint(tmp_path, model, optimizer, step=2)
        assert hvd_saef.load_checkpoint(tmp_path, model, optimizer)["step"] == 1
        step()

    together(2, fn)


@pytest.mark.parametrize("late", [False, True])
def test_with_overlap_x_is_as_before(late: bool) -> None:
    """An encoding that fails during backward is known before x changes; one after it is not."""
    from tests.round.test_overlap import Training, same

    def fn(rank: int) -> str:
        failing = Failing("encode", 0)
        training = Training(rank, compression=failing).steps(2)
        before = [x.clone() for x in training.optimizer.state_dict()["hvd_saef"]["x"].values()]
        failing.left["encode"] = (2 if late else 1) if rank == 1 else 0
        training.optimizer.zero_grad()
        layers = training.model[:3] if late else training.model
        layers(torch.randn(16, 20, generator=training.data)).square().mean().backward()
        with pytest.raises((ArithmeticError, WorkerError, ExchangeError)) as raised:
            training.optimizer.step()
        if late:
            assert isinstance(raised.value, ExchangeError)
            training.optimizer.reanchor()
        else:
            assert same(list(training.optimizer.state_dict()["hvd_saef"]["x"].values()), before)
        training.steps(2)
        return str(raised.value) + str(bits(training.optimizer.state_dict()["hvd_saef"]["x"]))

    told = together(2, fn)
    assert all("no encode" in said for said in told)


def test_payload_bytes_is_asked_before_anything_is_sent() -> None:
    def fn(rank: int) -> None:
        failing = Failing("payload_bytes", 0)
        run = Run(rank, compression=failing, bucket_bytes=64)
        failing.left["payload_bytes"] = 1 if rank == 1 else 0
        run.step()

    failures = caught(3, fn)
    assert isinstance(failures[1], ArithmeticError)
    assert "rank 1 raised ArithmeticError: no payload_bytes" in str(failures[0])


class Longer(SignCompressor):
    """Says that it needs more, and is the same otherwise."""

    @property
    def description(self) -> str:
        """A sign's."""
        return SignCompressor().description

    def payload_bytes(self, layout: Blocks) -> int:
        """A byte more than a sign's."""
        return super().payload_bytes(layout) + 1

    def encode(self, delta: BlockedTensor, payload: Tensor) -> None:
        """A sign's, without that byte."""
        SignCompressor().encode(delta, payload[:-1])

    def decode_add(self, payload: Tensor, out: BlockedTensor, weight: float) -> None:
        """A sign's, without that byte."""
        SignCompressor().decode_add(payload[:-1], out, weight)


def test_different_payload_bytes() -> None:
    """What MPI would say of them is not what is wrong."""

    def fn(rank: int) -> None:
        compressor = Longer() if rank == 1 else SignCompressor()
        Run(rank, compression=compressor).step()

    for failure in caught(3, fn):
        assert isinstance(failure, ConfigurationMismatchError)
        assert "workers disagree on the bytes of bucket 0" in str(failure)


class Writer:
    """Raises at its n-th scalar."""

    def __init__(self, call: int) -> None:
        self.left = call

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Nothing, or an error."""
        self.left -= 1
        if self.left == 0:
            raise OSError("disk full")


@pytest.mark.parametrize("fails", ["writer", "encode"])
def test_a_monitor_that_fails(fails: str) -> None:
    """All are told, the round is complete, and x is as without it."""

    def fn(rank: int, watched: bool) -> dict[str, bytes]:
        failing = Failing("encode", 0)
        run = Run(rank, compression=failing).step(2)
        if watched:
            monitor = Monitor(run.optimizer, every=1, tensorboard=Writer(3 if fails == "writer" else 0))
            if fails == "encode" and rank == 1:
                failing.left["encode"] = 1  # the monitor's own encoding comes first
            error: type[Exception] = OSError if (fails, rank) == ("writer", 0) else WorkerError
            error = ArithmeticError if (fails, rank) == ("encode", 1) else error
            with pytest.raises(error, match="disk full" if fails == "writer" else "no encode"):
                run.step()
            run.taken += 1
            monitor.close()
        else:
            run.step()
        return everything(run.step(2))

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))
