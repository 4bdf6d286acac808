"""overlap=True: the same bits, earlier; and what it rules out is refused."""

from __future__ import annotations

import copy
import gc
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef import Compression
from hvd_saef.errors import NonFiniteUpdateError, WorkerError
from tests.workers import caught, together

pytestmark = pytest.mark.both_arithmetics

LAYERS = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 3))
SMALL = 2000  # bytes of a bucket: several buckets


class Training:
    """One worker's copy of LAYERS, its optimizer and its data."""

    def __init__(self, rank: int, overlap: bool = True, **options: Any) -> None:
        self.rank = rank
        self.model = copy.deepcopy(LAYERS)
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.wrap(overlap, **options)
        self.data = torch.Generator().manual_seed(rank)

    def wrap(self, overlap: bool = True, **options: Any) -> None:
        """Wrap the optimizer, once more if it was."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer: Any = hvd_saef.DistributedOptimizer(
                self.inner,
                self.model.named_parameters(),
                model=self.model,
                bucket_bytes=SMALL,
                overlap=overlap,
                **options,
            )

    def backward(self, times: int = 1) -> None:
        """Gradients of `times` batches."""
        self.optimizer.zero_grad()
        for _ in range(times):
            self.model(torch.randn(16, 20, generator=self.data)).square().mean().backward()

    def steps(self, number: int, passes: int = 1) -> Training:
        """Some steps of training."""
        for _ in range(number):
            self.backward(passes)
            self.optimizer.step()
        return self

    @property
    def under_way(self) -> bool:
        """Whether anything has left before step()."""
        return bool(self.optimizer._saef.exchange.busy)

    def state(self) -> list[Tensor]:
        """X and e, and what the torch optimizer keeps."""
        ours = self.optimizer.state_dict()["hvd_saef"]
        parameters = [p for group in self.inner.param_groups for p in group["params"]]
        kept = [v for p in parameters for v in self.inner.state.get(p, {}).values()]
        return [*ours["x"].values(), *ours["errors"].values(), *kept]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether all bits are equal."""
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"averaging_period": 3},
        {"local_steps": 3},
        {"warmup_steps": 2},
        {"server_step_ahead": 1.0},
        {"double_compression": False},
        {"server": "sharded"},
        {"feedback": "ef"},
        {"compression": Compression.topk(0.1)},
        {"compression": lambda name, _: Compression.none if "bias" in name else Compression.sign},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_same_bits(options: dict[str, Any], workers: int) -> None:
    """As without, and the buckets do leave early: else there would be nothing to test."""
    plain = together(workers, lambda k: Training(k, overlap=False, **options).steps(7).state())

    def work(rank: int) -> tuple[list[Tensor], list[bool]]:
        training = Training(rank, **options)
        early = []
        for _ in range(7):
            training.backward()
            early.append(training.under_way)
            training.optimizer.step()
        return training.state(), early

    for (found, early), expected in zip(together(workers, work), plain, strict=True):
        last = options.get("local_steps", 1) - 1
        period = last + 1
        assert early == [step > 0 and step % period == last for step in range(7)]
        assert same(found, expected)


def test_several_passes() -> None:
    """Buckets leave in the last of the passes that were announced."""
    plain = together(2, lambda k: Training(k, overlap=False).steps(5, passes=3).state())
    early = together(2, lambda k: Training(k, backward_passes_per_step=3).steps(5, passes=3).state())
    assert all(same(a, b) for a, b in zip(early, plain, strict=True))


def test_a_pass_too_many() -> None:
    """One that was not announced comes too late: an error, not another result.

    It is autograd's if the early step, in its own thread, writes a weight after the forward pass has read it.
    """

    def work(rank: int) -> None:
        training = Training(rank).steps(2)
        training.backward(2)

    said = [str(failure) for failure in caught(2, work) if not _gone(failure)]
    assert said
    assert all(re.search("backward_passes_per_step=1|modified by an inplace operation", one) for one in said)


def test_missing_gradients() -> None:
    """Parameters without a gradient hold their bucket back until step(), and contribute nothing."""

    def work(rank: int, overlap: bool) -> list[Tensor]:
        training = Training(rank, overlap)
        for step in range(5):
            training.optimizer.zero_grad()
            used = training.model[: 3 + 2 * (step % 2)]  # the last layer every other time
            used(torch.randn(16, 20, generator=training.data)).square().mean().backward()
            training.optimizer.step()
        return training.state()

    plain = together(2, lambda k: work(k, overlap=False))
    assert all(same(a, b) for a, b in zip(together(2, lambda k: work(k, overlap=True)), plain, strict=True))


def test_frozen_on_the_way() -> None:
    """A layer that is frozen while training does not hold its bucket back."""

    def work(rank: int, overlap: bool) -> tuple[list[Tensor], bool]:
        training = Training(rank, overlap).steps(2)
        training.model[4].requires_grad_(False)
        training.steps(1)
        training.backward()
        early = training.under_way
        training.optimizer.step()
        return training.state(), early

    plain = together(2, lambda k: work(k, overlap=False))
    for (found, early), (expected, _) in zip(
        together(2, lambda k: work(k, overlap=True)), plain, strict=True
    ):
        assert early
        assert same(found, expected)


def test_a_look_at_x_in_between() -> None:
    """Evaluating between backward and step() finds x, and changes nothing."""

    def work(rank: int, overlap: bool, look: bool) -> list[Tensor]:
        training = Training(rank, overlap, local_steps=2)
        for step in range(6):
            training.backward()
            if look and step:
                x = training.optimizer._saef.modes.state.views_of("x")
                with training.optimizer.consensus():
                    assert same([p.detach() for p in training.model.parameters()], list(x.values()))
            training.optimizer.step()
        return training.state()

    plain = together(2, lambda k: work(k, overlap=False, look=False))
    looking = together(2, lambda k: work(k, overlap=True, look=True))
    assert all(same(a, b) for a, b in zip(looking, plain, strict=True))


def test_a_state_cannot_be_saved_in_between(tmp_path: Path) -> None:
    """Errors and momentum have taken the step by then, and x has not: loading that would lose the update."""

    def work(rank: int) -> tuple[str, str]:
        training = Training(rank, overlap=True)
        training.backward()
        training.optimizer.step()
        training.backward()
        with pytest.raises(RuntimeError, match="between backward and step") as local:
            training.optimizer.state_dict()
        with pytest.raises(hvd_saef.CheckpointError, match="between backward and step") as all_of_them:
            hvd_saef.save_checkpoint(tmp_path, training.model, training.optimizer)
        training.optimizer.step()
        hvd_saef.save_checkpoint(tmp_path, training.model, training.optimizer)
        return str(local.value), str(all_of_them.value)

    for said in together(2, work):
        assert all("call step() first" in words for words in said)


def clip(training: Training) -> None:
    """What many do between backward and step."""
    nn.utils.clip_grad_norm_(training.model.parameters(), 1e-3)
    training.optimizer.step()


def close(training: Training) -> None:
    """A closure."""
    training.optimizer.step(lambda: torch.tensor(0.0))


def scale(training: Training) -> None:
    """A GradScaler."""
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(training.model(torch.ones(2, 20)).mean()).backward()
    scaler.step(training.optimizer)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (clip, "a gradient was changed after backward"),
        (close, "step(closure)"),
        (scale, "GradScaler"),
        (lambda training: training.optimizer.flush(), "flush() between backward and step()"),
        (lambda training: training.optimizer.reanchor(), "reanchor() between backward and step()"),
    ],
    ids=["clipping", "closure", "GradScaler", "flush", "reanchor"],
)
def test_refused(use: Callable[[Training], None], message: str) -> None:
    """On every worker, without a hang, even if one alone does it."""

    def work(rank: int, who: tuple[int, ...]) -> None:
        training = Training(rank).steps(2)
        if use is not scale:
            training.backward()
        if rank in who:
            use(training)
        else:
            training.optimizer.step()

    for who in [(0, 1, 2), (1,)] if use is clip else [(0, 1, 2)]:
        raised = caught(3, lambda rank: work(rank, who))  # noqa: B023
        assert all(message in str(failure) or _gone(failure) for failure in raised)
        assert any(message in str(failure) for failure in raised)


def test_nonfinite() -> None:
    """Found on the way, said by all in step(), and x is as it was."""

    def work(rank: int) -> tuple[str, bool]:
        training = Training(rank).steps(2)
        before = [t.clone() for t in training.optimizer.state_dict()["hvd_saef"]["x"].values()]
        training.optimizer.zero_grad()
        batch = torch.randn(16, 20, generator=training.data)
        if rank == 1:
            batch[0, 0] = torch.nan
        training.model(batch).square().mean().backward()
        assert training.under_way
        with pytest.raises(NonFiniteUpdateError) as raised:
            training.optimizer.step()
        assert not training.under_way
        return str(raised.value), same(
            list(training.optimizer.state_dict()["hvd_saef"]["x"].values()), before
        )

    for message, kept in together(3, work):
        assert "on rank 1" in message
        assert kept


def test_what_it_does_not_go_with() -> None:
    """Refused when wrapping."""
    for options, words in (
        ({"on_nonfinite": "skip"}, "on_nonfinite='raise'"),
        ({"feedback": "none", "compression": Compression.none}, "overlap=False"),
    ):
        raised = caught(1, lambda k: Training(k, **options))  # noqa: B023
        assert isinstance(raised[0], ValueError)
        assert "overlap=True" in str(raised[0])
        assert words in str(raised[0])


def test_a_load_in_between() -> None:
    """On one rank, after updates had left: an error on all of them."""

    def work(rank: int) -> None:
        training = Training(rank).steps(2)
        saved = copy.deepcopy(training.optimizer.state_dict())
        training.backward()
        if rank == 0:
            training.optimizer.load_state_dict(saved)
        training.optimizer.step()

    assert all("between backward and step()" in str(failure) or _gone(failure) for failure in caught(2, work))


def test_dropped_optimizers_leave_no_hooks() -> None:
    """The parameters are as they were before they were wrapped."""

    def work(rank: int) -> int:
        training = Training(rank).steps(2)
        parameter = next(training.model.parameters())
        assert parameter._post_accumulate_grad_hooks
        training.optimizer = training.inner = None  # type: ignore[assignment]
        gc.collect()
        return len(parameter._post_accumulate_grad_hooks)

    assert together(1, work) == [0]


def _gone(failure: Exception) -> bool:
    """Whether the failure is only that another worker failed."""
    return isinstance(failure, WorkerError | hvd_saef.errors.SaefError)
