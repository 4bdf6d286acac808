"""overlap=True: local steps apart from the thread that computes, and what goes wrong in them."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import hvd_saef
from hvd_saef.errors import NonFiniteUpdateError, WorkerError
from tests.round.test_overlap import SMALL, Training, same
from tests.workers import caught, together


class Mine(torch.optim.AdamW):
    """Torch's, but a class of somebody's: its step may do anything."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Torch's."""
        return super().step(closure)


class Counting(Mine):
    """Counts its steps in its parameter group."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Torch's, and one more."""
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def training_with(make: type[torch.optim.AdamW], rank: int, overlap: bool = True) -> Training:
    """`Training` by another optimizer."""
    training = Training(rank, overlap)
    training.model = copy.deepcopy(training.model)
    training.inner = make(training.model.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training.optimizer = hvd_saef.DistributedOptimizer(
            training.inner,
            training.model.named_parameters(),
            model=training.model,
            bucket_bytes=SMALL,
            overlap=overlap,
        )
    return training


@pytest.fixture
def steps_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads in which torch.optim.AdamW takes steps, one name a step."""
    threads: list[str] = []
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # the first one of a class gives its step the hooks
    step: Any = torch.optim.AdamW.step

    def noting(self: Any, closure: Any = None) -> Any:
        threads.append(threading.current_thread().name)
        return step(self, closure)

    noting.hooked = True  # type: ignore[attr-defined]  # they would fire twice
    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    return threads


def test_torchs_own_steps_in_the_background(steps_in: list[str]) -> None:
    """Nobody who looks during backward sees parameter groups without some of their parameters."""

    def work(rank: int) -> tuple[list[int], str]:
        training, seen = Training(rank).steps(2), []
        first = next(training.model.parameters())
        first.register_hook(lambda _: seen.append(len(training.optimizer.param_groups[0]["params"])))
        steps_in.clear()
        training.steps(1)
        return seen, threading.current_thread().name

    ((seen, here),) = together(1, work)
    assert seen == [6]
    assert len(steps_in) > 1
    assert here not in steps_in


def test_others_step_where_gradients_are_computed(steps_in: list[str]) -> None:
    """A class of somebody's expects to be called by the thread that trains; the bits are the same."""
    plain = together(2, lambda k: training_with(Mine, k, overlap=False).steps(5).state())
    steps_in.clear()
    here: list[str] = []

    def work(rank: int) -> list[Tensor]:
        here.append(threading.current_thread().name)
        return training_with(Mine, rank).steps(5).state()

    assert all(same(a, b) for a, b in zip(together(2, work), plain, strict=True))
    assert set(steps_in) == set(here)


@pytest.mark.parametrize("for_all", [False, True], ids=["of the optimizer", "of all optimizers"])
def test_hooks(for_all: bool, steps_in: list[str]) -> None:
    """Hooks on steps fire in the thread that trains, once a step, and see what was wrapped."""

    def work(rank: int) -> tuple[int, int, list[Tensor]]:
        training, fired = Training(rank).steps(2), []

        def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
            if optimizer is training.optimizer:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                fired.append((threading.current_thread().name, len(parameters)))

        register: Any = (
            register_optimizer_step_pre_hook if for_all else training.optimizer.register_step_pre_hook
        )
        handle = register(hook)
        training.steps(1)
        handle.remove()
        assert {name for name, _ in fired} == {threading.current_thread().name}
        steps_in.clear()
        training.steps(1)
        assert threading.current_thread().name not in steps_in
        return len(fired), sum(number for _, number in fired), training.state()

    plain = together(1, lambda k: Training(k, overlap=False).steps(4).state())
    for (times, parameters, found), expected in zip(together(1, work), plain, strict=True):
        assert times == 1
        assert parameters == 6
        assert same(found, expected)


@pytest.mark.filterwarnings("ignore:.*step hooks:UserWarning", "ignore:the largest block")
@pytest.mark.parametrize("who", [{0, 1}, {1}], ids=str)
def test_a_moving_average_by_a_hook(who: set[int]) -> None:
    """Of x, once a step: in a deep model, backward still needs what a look in the middle of it would move."""
    start = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(3, 3), nn.Tanh())))

    def work(rank: int, overlap: bool) -> list[Tensor]:
        model = copy.deepcopy(start)
        average = [parameter.detach().clone() for parameter in model.parameters()]
        inner = torch.optim.AdamW(model.parameters(), lr=0.05)
        optimizer: Any = hvd_saef.DistributedOptimizer(
            inner, model.named_parameters(), model=model, overlap=overlap, bucket_bytes=1
        )

        def update(*_: object) -> None:
            for mine, value in zip(average, model.state_dict().values(), strict=True):
                mine.lerp_(value, 0.1)

        if rank in who:
            optimizer.register_step_post_hook(update)
        for number in range(4):
            model.zero_grad()
            generator = torch.Generator().manual_seed(10 * number + rank)
            model(torch.randn(5, 3, generator=generator)).square().sum().backward()
            optimizer.step()
        return [*average, *(value.clone() for value in model.state_dict().values())]

    found = together(2, lambda rank: work(rank, True))
    for mine, theirs in zip(found, together(2, lambda rank: work(rank, False)), strict=True):
        assert same(mine, theirs)


@pytest.mark.parametrize("early", [False, True], ids=["made after wrapping", "made before wrapping"])
def test_schedulers(early: bool) -> None:
    """Rates and momenta that change from step to step: the same bits, and no warning."""

    def work(rank: int, overlap: bool) -> list[Tensor]:
        training = Training(rank, overlap)
        watched = training.inner if early else training.optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(watched, max_lr=0.1, total_steps=10)
        rates = set()
        for _ in range(6):
            training.steps(1)
            schedule.step()
            rates.add(training.optimizer.param_groups[0]["lr"])
        assert len(rates) > 3
        return training.state()

    plain = together(2, lambda k: work(k, overlap=False))
    found = together(2, lambda k: work(k, overlap=True))
    assert all(same(a, b) for a, b in zip(found, plain, strict=True))
    with warnings.catch_warnings():  # which several threads must not do at a time
        warnings.simplefilter("error")
        together(1, lambda k: work(k, overlap=True))


def test_options_that_a_step_writes() -> None:
    """Written once a bucket, they would not be what they are without overlap: refused by all, if by one."""
    assert together(
        1, lambda k: training_with(Counting, k, overlap=False).steps(3).inner.param_groups[0]["k"]
    )

    def work(rank: int) -> None:
        training_with(Counting if rank == 1 else Mine, rank).steps(3)

    failures = caught(2, work)
    assert "changes 'k' of its parameter group" in str(failures[1])
    assert isinstance(failures[0], WorkerError)


def breaks(training: Training) -> None:
    """Options that no step can be taken with."""
    training.inner.param_groups[0]["betas"] = None


@pytest.mark.parametrize("make", [torch.optim.AdamW, Mine], ids=["in the background", "here"])
def test_an_exception(make: type[torch.optim.AdamW]) -> None:
    """On one worker, in the step of some bucket: an error in step() on all, with x as it was."""

    def work(rank: int) -> Exception:
        training = training_with(make, rank).steps(2)
        before = [t.clone() for t in training.optimizer.state_dict()["hvd_saef"]["x"].values()]
        if rank == 1:
            breaks(training)
        training.backward()
        assert training.under_way
        with pytest.raises((TypeError, WorkerError)) as raised:
            training.optimizer.step()
        assert not training.under_way
        assert same(list(training.optimizer.state_dict()["hvd_saef"]["x"].values()), before)
        return raised.value

    failures = together(3, work)
    assert isinstance(failures[1], TypeError)
    for rank in (0, 2):
        assert "rank 1 raised TypeError" in str(failures[rank])


@pytest.mark.parametrize("sent", [0, 1], ids=["the other has sent", "it has sent itself"])
def test_an_exception_where_only_one_has_sent(sent: int) -> None:
    """The rank without the last layer's gradients has sent nothing, and takes part in what others have."""

    def work(rank: int) -> None:
        training = Training(rank).steps(2)
        if rank == 1:
            breaks(training)
        training.optimizer.zero_grad()
        layers = training.model if rank == sent else training.model[:3]
        layers(torch.randn(16, 20, generator=training.data)).square().mean().backward()
        assert training.under_way == (rank == sent)
        training.optimizer.step()

    for rank, failure in enumerate(caught(2, work)):
        assert "rank 1 raised TypeError" in str(failure) or (rank == 1 and isinstance(failure, TypeError))


def test_a_step_that_overflows() -> None:
    """On one worker, in the background: an error in step() on all, with x as it was."""

    def work(rank: int) -> str:
        training = Training(rank).steps(2)
        before = [t.clone() for t in training.optimizer.state_dict()["hvd_saef"]["x"].values()]
        if rank == 1:
            training.inner.param_groups[0]["lr"] = 1e30
        training.backward()
        with pytest.raises(NonFiniteUpdateError) as raised:
            training.optimizer.step()
        assert same(list(training.optimizer.state_dict()["hvd_saef"]["x"].values()), before)
        return str(raised.value)

    for message in together(2, work):
        assert "on rank 1. " in message
        assert "on rank 0" not in message


@pytest.mark.parametrize(
    "drop",
    [
        lambda training: training.optimizer.zero_grad(),
        lambda training: training.optimizer.zero_grad(set_to_none=False),
    ],
    ids=["dropped", "zeroed"],
)
def test_gradients_gone(drop: Callable[[Training], None]) -> None:
    """Another thread may still need them: refused whenever it comes."""

    def work(rank: int) -> None:
        training = Training(rank).steps(2)
        training.backward()
        drop(training)
        training.optimizer.step()

    assert all("a gradient was changed after backward" in str(failure) for failure in caught(1, work))


def test_a_weight_that_backward_still_needs() -> None:
    """Autograd says so, as for any that is changed in place before it is used, however late the step is."""

    def work(rank: int) -> None:
        training = Training(rank).steps(2)
        last = list(training.model.parameters())[4]
        h = training.model[0](torch.randn(4, 20))
        h = h * last.detach()[0, :30]  # saved for the backward of the first layer
        training.model[1:](h).square().mean().backward()

    for failure in caught(1, work):
        assert "modified by an inplace operation" in str(failure)


def test_looks_while_others_have_not_sent() -> None:
    """A worker that evaluates between backward and step() waits for its own encoding, for nobody else's."""

    def work(rank: int, overlap: bool) -> list[Tensor]:
        training = Training(rank, overlap)
        for step in range(4):
            if rank == 1 and step == 2:  # its last layers have no gradient, and wait for step()
                training.optimizer.zero_grad()
                training.model[:3](torch.ones(2, 20)).square().mean().backward()
            else:
                training.backward()
            with training.optimizer.consensus():
                pass
            training.optimizer.step()
        return training.state()

    plain = together(2, lambda k: work(k, overlap=False))
    assert all(same(a, b) for a, b in zip(together(2, lambda k: work(k, overlap=True)), plain, strict=True))
