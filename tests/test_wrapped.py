"""What else is done to the returned optimizer: copies, pickles, torch's distributed checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from tests.workers import NO_MODEL, Job, Run, network, sgd, together, warned

pytestmark = pytest.mark.filterwarnings(NO_MODEL, "ignore:a state without")


def scheduled(optimizer: Any) -> Any:
    return copy.deepcopy(torch.optim.lr_scheduler.StepLR(optimizer, 2))


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda optimizer: torch.save(optimizer, io.BytesIO()),
    "within something": lambda optimizer: copy.deepcopy({"trainer": [optimizer]}),
    "a scheduler": scheduled,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_refused_and_say_what_to_do(duplicate: Callable[[Any], Any]) -> None:
    def fn(rank: int) -> None:
        run = Run(rank).step(2)
        with pytest.raises(TypeError, match=r"neither copied nor pickled.*Save optimizer.state_dict\(\)"):
            duplicate(run.optimizer)
        run.step(1)

    together(2, fn)


def test_the_optimizer_that_was_wrapped_can_be_copied() -> None:
    def fn(rank: int) -> None:
        run = Run(rank, sgd).step(2)
        for other in (copy.deepcopy(run.inner), pickle.loads(pickle.dumps(run.inner))):
            assert type(other) is torch.optim.SGD
            other.step()
        run.step(1)

    together(1, fn)


def test_torchs_distributed_state_dicts_lose_ours_with_a_word() -> None:
    """They pass on what is torch's alone: x and momentum are there, errors and rounds begin anew."""

    def fn(rank: int) -> None:
        job = Job(rank, network(), sgd)
        job.model.train()
        for step in range(3):
            job.model.zero_grad()
            generator = torch.Generator().manual_seed(step)
            job.model(torch.randn(6, 4, generator=generator)).square().sum().backward()
            job.optimizer.step()
        job.model.zero_grad()
        model, optimizer = get_state_dict(job.model, job.optimizer)
        assert "hvd_saef" not in optimizer
        again = Job(rank, network(), sgd, seed=1)
        set_state_dict(
            again.model,
            again.optimizer,
            model_state_dict=copy.deepcopy(model),
            optim_state_dict=copy.deepcopy(optimizer),
        )
        assert again.seen() == job.seen()
        again.model.train()
        again.model(torch.ones(6, 4)).square().sum().backward()
        again.optimizer.step()
        assert again.optimizer.stats()["rounds"] == 1

    told = [text for _, text in warned(2, fn) if "without 'hvd_saef'" in text]
    assert told
    assert all("get_state_dict" in text and "save_checkpoint" in text for text in told)
