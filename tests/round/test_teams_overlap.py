"""overlap=True with workers of several ranks: the same bits, and ranks whose backwards differ do not hang."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvd_saef.errors import NonFiniteUpdateError, WorkerError
from tests.round.test_overlap import Training, same
from tests.workers import caught, together

OPTIONS: list[dict[str, Any]] = [
    {},
    {"averaging_period": 3},
    {"local_steps": 3},
    {"warmup_steps": 2},
    {"double_compression": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("workers", [1, 2])
def test_overlap_changes_no_bit(options: dict[str, Any], workers: int) -> None:
    def fn(rank: int) -> None:
        early, late = (
            Training(rank, overlap, worker="node", check_consensus_every=1, **options).steps(7)
            for overlap in (True, False)
        )
        assert same(early.state(), late.state())
        alone = Training(rank, True, **options).steps(7)
        assert not same(early.state(), alone.state())
        sent = [training.optimizer.stats()["node_bytes_sent"] for training in (early, late)]
        assert sent[0] == sent[1] > 0

    together(workers, fn, ranks=2)


def test_something_leaves_during_backward() -> None:
    def fn(rank: int) -> None:
        training = Training(rank, worker="node").steps(2)
        training.backward()
        assert training.optimizer._saef.overlap.under_way
        training.optimizer.step()

    together(2, fn, ranks=2)


def test_ranks_of_a_node_without_some_gradients() -> None:
    """Unused layers hold a rank's later buckets back until step(): the others must not wait in backward."""

    def fn(rank: int) -> list[torch.Tensor]:
        both = []
        for overlap in (True, False):
            training = Training(rank, overlap, worker="node", check_consensus_every=1)
            for step in range(5):
                training.backward()
                if step == 3 and rank == 1:  # the loss takes the last layer's weight alone
                    training.optimizer.step()
                    training.optimizer.zero_grad()
                    next(training.model[4].parameters()).square().sum().backward()
                elif step == 3:
                    training.optimizer.step()
                    training.backward()
                training.optimizer.step()
            both.append(training.state())
        assert same(*both)
        return both[0]

    found = together(2, fn, ranks=2)
    assert same(found[0], found[1])


def test_a_nan_on_one_rank_is_that_ranks() -> None:
    def fn(rank: int) -> None:
        training = Training(rank, worker="node").steps(2)
        training.optimizer.zero_grad()
        x = torch.randn(4, 20) * (torch.nan if rank == 2 else 1.0)
        training.model(x).square().mean().backward()
        training.optimizer.step()

    for failure in caught(2, fn, ranks=2):
        assert isinstance(failure, NonFiniteUpdateError)
        assert "on rank 2. " in str(failure)


def test_an_exception_on_one_rank_is_everyones() -> None:
    def fn(rank: int) -> None:
        training = Training(rank, worker="node").steps(2)
        training.backward()
        if rank == 1:
            torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1e-3)
        training.optimizer.step()

    failures = caught(2, fn, ranks=2)
    assert "was changed after backward" in str(failures[1])
    assert all(isinstance(failure, WorkerError) for failure in failures if failure is not failures[1])
