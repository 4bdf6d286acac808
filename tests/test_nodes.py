"""worker="node": threads stand for the ranks of a node, against the oracle of as many workers as nodes."""

from __future__ import annotations

from typing import Any

import pytest

from hvd_saef import run_workers
from tests.nodes import of_nodes
from tests.oracle import Setup, run
from tests.problems import STEPS, Outcome, curved_valley, run_library, same_bits, schedule, start_point, worst
from tests.workers import NO_MODEL

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
]
TOLERANCE = 1e-10
SETUPS: list[tuple[dict[str, Any], str]] = [
    ({"double_compression": False}, "auto"),
    ({}, "replicated"),
    ({"block_size": 17}, "sharded"),
    ({"feedback": "ef", "averaging_period": 3}, "auto"),
    ({"server_step_ahead": 1.0, "step_ahead": 0.5}, "auto"),
    ({"compressor": "topk", "local_steps": 3, "optimizer": "adamw"}, "sharded"),
    ({"warmup_steps": 4, "local_steps": 2}, "auto"),
    ({"compressor": "none"}, "auto"),
    ({"compressor": "none", "feedback": "none"}, "auto"),
]


def setup(workers: int, **settings: Any) -> Setup:
    defaults: dict[str, Any] = {"compressor": "sign", "optimizer": "sgdm", "weight_decay": 0.01}
    return Setup(workers=workers, lr=schedule, **(defaults | settings))


def outcomes(wanted: Setup, ranks: int, **options: Any) -> list[Outcome]:
    def work(rank: int) -> Outcome:
        return run_library(wanted, rank, start_point(), **({"worker": "node"} | options))

    return run_workers(wanted.workers, work, ranks=ranks)


@pytest.mark.parametrize(("workers", "ranks"), [(2, 2), (3, 2), (2, 3), (1, 2)])
@pytest.mark.parametrize(("settings", "server"), SETUPS, ids=str)
def test_nodes_are_the_oracles_workers(
    settings: dict[str, Any], server: str, workers: int, ranks: int
) -> None:
    wanted = setup(workers, **settings)
    truth = run(wanted, start_point(), of_nodes(curved_valley, workers * [ranks]), STEPS)
    found = outcomes(wanted, ranks, server=server)
    for rank, outcome in enumerate(found):
        node = rank // ranks
        if wanted.feedback == "none":
            assert worst(outcome.parameters, truth.x) <= TOLERANCE
            continue
        assert worst(outcome.x, truth.x) <= TOLERANCE
        assert worst(outcome.parameters, truth.parameters[node]) <= TOLERANCE
        assert worst(outcome.errors, truth.errors[node]) <= TOLERANCE
        assert same_bits(outcome.x, found[0].x)
        assert same_bits(outcome.errors, found[node * ranks].errors)


def test_the_oracle_tells_nodes_from_ranks() -> None:
    """The counter-test: gradients that are not averaged on the node end elsewhere."""
    wanted = setup(2)
    truth = run(wanted, start_point(), curved_valley, STEPS)
    assert worst(outcomes(wanted, 2)[0].x, truth.x) > 1e-6
