"""Evaluation and saving under torch.inference_mode, as frameworks do both, change nothing of what follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hvd_saef
from tests.workers import Job, bits, together

SETTINGS: dict[str, dict[str, Any]] = {
    "saef, averaging": {"averaging_period": 2},
    "server, topk": {"server_step_ahead": 0.5, "compression": hvd_saef.Compression.topk(0.2)},
    "three local steps": {"local_steps": 3},
    "overlap": {"overlap": True},
}


def run(rank: int, within: Callable[[], Any], folder: Path, options: dict[str, Any]) -> dict[str, bytes]:
    """The bits of a run that evaluates and saves within a context, before training and after each step."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    job = Job(rank, model, **options)
    seen = []

    def look() -> None:
        model.eval()
        with within():
            seen.append(model(torch.ones(4, 3)).sum().item())
            if job.taken in (0, 2):
                hvd_saef.save_checkpoint(folder, model, job.optimizer)
        model.train()

    look()
    for _ in range(4):
        job.step()
        look()
    job.optimizer.consolidate()
    return bits({"seen": seen, "at": list(model.parameters()), "state": job.optimizer.state_dict()})


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_it_is_as_under_no_grad(options: dict[str, Any], tmp_path: Path) -> None:
    def both(rank: int) -> tuple[dict[str, bytes], ...]:
        modes = (torch.no_grad, torch.inference_mode)
        return tuple(run(rank, mode, tmp_path / mode.__name__, options) for mode in modes)

    for usual, inference in together(2, both):
        assert inference == usual
