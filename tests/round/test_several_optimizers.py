"""Several optimizers on the same ranks, with overlap or without: each comes to the bits it has alone."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_saef import Compression
from tests.round.test_overlap import Training, same
from tests.workers import together

DENSE_BIASES: dict[str, Any] = {
    "compression": lambda name, _: Compression.none if "bias" in name else Compression.sign
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"double_compression": False},
    {"server": "replicated"},
    {"averaging_period": 2},
    {"warmup_steps": 2},
    DENSE_BIASES,
]


def without_last_layer(training: Training) -> None:
    """Gradients of a batch for all but the last layer."""
    training.optimizer.zero_grad()
    training.model[:3](torch.randn(16, 20, generator=training.data)).square().mean().backward()


def turn(trainings: list[Training], step: int, rank: int) -> None:
    """A step of each: backwards first, then the steps in the other order; rank 1 lacks gradients of one."""
    for training in trainings:
        if rank == 1 and training is trainings[0] and step % 2:
            without_last_layer(training)
        else:
            training.backward()
    for training in reversed(trainings):
        training.optimizer.step()


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: ", ".join(options) or "plain")
@pytest.mark.parametrize(
    "overlaps", [(True, True), (True, False), (False, True), (True, False, True)], ids=str
)
def test_each_trains_as_alone(options: dict[str, Any], overlaps: tuple[bool, ...]) -> None:
    def work(rank: int, early: tuple[bool, ...]) -> list[Tensor]:
        trainings = [Training(rank, overlap, **options) for overlap in early]
        for step in range(6):
            turn(trainings, step, rank)
        return [tensor for training in trainings for tensor in training.state()]

    plain = together(3, lambda rank: work(rank, len(overlaps) * (False,)))
    for found, expected in zip(together(3, lambda rank: work(rank, overlaps)), plain, strict=True):
        assert same(found, expected)


@pytest.mark.parametrize("overlaps", [(True, True), (True, False)], ids=str)
def test_workers_of_several_ranks(overlaps: tuple[bool, ...]) -> None:
    def work(rank: int, early: tuple[bool, ...]) -> list[Tensor]:
        trainings = [Training(rank, overlap, worker="node") for overlap in early]
        for step in range(5):
            turn(trainings, step, rank)
        return [tensor for training in trainings for tensor in training.state()]

    plain = together(2, lambda rank: work(rank, len(overlaps) * (False,)), ranks=2)
    found = together(2, lambda rank: work(rank, overlaps), ranks=2)
    assert all(same(a, b) for a, b in zip(found, plain, strict=True))


def test_what_horovod_averages_waits_for_step_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []  # not by catching warnings, which threads that wrap do at the same time
    warns = SimpleNamespace(warn=lambda message, **_: said.append(message))
    monkeypatch.setattr("hvd_saef.round.overlap.warnings", warns)

    def fn(rank: int) -> None:
        trainings = [Training(rank, **DENSE_BIASES) for _ in range(2)]
        for _ in range(2):
            turn(trainings, 0, rank)
        for training in trainings:
            training.backward()
            trips = training.optimizer._saef.exchange.under_way
            left = [trip.bucket_state.bucket.compressor for trip in trips]
            assert left
            assert Compression.none not in left
        for training in trainings:
            training.optimizer.step()

    together(2, fn)
    assert len(said) == 2  # rank 0 speaks, once an optimizer
    assert all("waits for step()" in message for message in said)


def test_a_second_wrapper_of_the_same_parameters_is_no_other_optimizer() -> None:
    def fn(rank: int) -> None:
        training = Training(rank, **DENSE_BIASES).steps(2)
        earlier = training.optimizer  # still there when the new one is made
        training.wrap(**DENSE_BIASES)
        training.steps(2)
        training.backward()
        left = [trip.bucket_state.bucket.compressor for trip in training.optimizer._saef.exchange.under_way]
        assert Compression.none in left
        training.optimizer.step()
        del earlier

    together(2, fn)


def test_lines_come_back() -> None:
    def fn(rank: int) -> int:
        kept = Training(rank).steps(2)
        for _ in range(20):
            Training(rank).steps(2)
        kept.steps(1)
        return int(kept.optimizer._saef.communicator.lines._made)

    assert all(made <= 2 for made in together(2, fn))


def test_lines_with_payloads_of_the_dropped_do_not_come_back() -> None:
    """An optimizer that is dropped between backward and step(): the next one's payloads are its own."""

    def fn(rank: int) -> list[Tensor]:
        dropped = Training(rank).steps(2)
        if rank == 1:
            without_last_layer(dropped)
        else:
            dropped.backward()
        exchange = dropped.optimizer._saef.exchange
        exchange.wait_until_encoded()  # what is still to be encoded has not been dropped yet
        assert exchange.busy == (rank != 1)
        del exchange
        del dropped
        gc.collect()
        return Training(rank).steps(4).state()

    plain = together(2, lambda rank: Training(rank).steps(4).state())
    assert all(same(a, b) for a, b in zip(together(2, fn), plain, strict=True))


def test_wrapped_between_backward_and_step_of_another() -> None:
    """Even if only one rank has sent anything, all are told; the other goes on."""

    def fn(rank: int) -> list[Tensor]:
        training = Training(rank).steps(2)
        if rank == 1:
            without_last_layer(training)
        else:
            training.backward()
        with pytest.raises(RuntimeError, match="between backward and step"):
            Training(rank)
        training.optimizer.step()
        return training.state()

    def alone(rank: int) -> list[Tensor]:
        training = Training(rank, overlap=False).steps(2)
        if rank == 1:
            without_last_layer(training)
        else:
            training.backward()
        training.optimizer.step()
        return training.state()

    assert all(same(a, b) for a, b in zip(together(2, fn), together(2, alone), strict=True))
