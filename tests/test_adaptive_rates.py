"""The hint on rank 0 where an adaptive optimizer takes its steps on local gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hvd_saef
from tests.workers import NO_MODEL, Run, adamw, sgd, warned

pytestmark = pytest.mark.filterwarnings(NO_MODEL)
DENSE = hvd_saef.Compression.none


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (adamw, {}, "AdamW divides each of the 3 workers' updates"),
        (adamw, {}, "try 1.7 times the rate"),
        (adamw, {"feedback": "ef", "compression": DENSE}, "AdamW divides"),
        (lambda p: torch.optim.RMSprop(p), {}, "RMSprop divides"),
        (sgd, {}, None),
        (adamw, {"feedback": "none", "compression": DENSE}, None),
    ],
)
def test_hint(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], options: dict[str, Any], said: str | None
) -> None:
    """Not where gradients are averaged, and not for SGD."""
    told = [(rank, text) for rank, text in warned(3, lambda r: Run(r, make, **options)) if "divides" in text]
    assert [rank for rank, _ in told] == ([0] if said else [])
    assert not said or said in told[0][1]


def test_no_hint_for_one_worker() -> None:
    assert not [text for _, text in warned(1, lambda rank: Run(rank, adamw)) if "divides" in text]


@pytest.mark.parametrize(("nodes", "said"), [(1, []), (2, ["2 workers' updates", "try 1.4 times the rate"])])
def test_workers_are_nodes(nodes: int, said: list[str]) -> None:
    """K is the number of workers, however many ranks they have: gradients of a node's ranks are averaged."""

    def fn(rank: int) -> None:
        Run(rank, adamw, worker="node")

    told = [(rank, text) for rank, text in warned(nodes, fn, ranks=2) if "divides" in text]
    assert [rank for rank, _ in told] == ([0] if said else [])
    assert all(words in told[0][1] for words in said)
