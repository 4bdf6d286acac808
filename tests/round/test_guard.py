"""Wrong use: each is an error that says so, or a warning, and the same on all workers."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hvd_saef
from hvd_saef import WorkerError
from tests.workers import NO_MODEL, Job, Run, bits, everything, network, sgd, together, train, warned

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
]


def to_double(model: nn.Module) -> None:
    model.double()


def resize(model: nn.Module) -> None:
    parameter = next(model.parameters())
    with torch.no_grad():
        parameter.set_(torch.ones(5, 4))  # type: ignore[call-overload]


def transpose(model: nn.Module) -> None:
    """The same shape, in another memory order."""
    parameter = next(model.parameters())
    with torch.no_grad():
        parameter.set_(parameter.detach().t().contiguous().t())  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (to_double, r"'0\.weight' changed its dtype from torch.float32 to torch.float64"),
        (resize, r"'0\.weight' changed its shape from \(3, 4\) to \(5, 4\)"),
        (transpose, r"'0\.weight' changed its strides from \(4, 1\) to \(1, 3\)"),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_parameter_that_changes_after_wrapping(
    change: Callable[[nn.Module], None], words: str, steps: int
) -> None:
    def fn(rank: int) -> None:
        model = network()
        optimizer = hvd_saef.DistributedOptimizer(sgd(list(model.parameters())), model.named_parameters())
        for step in range(steps):
            train(model, optimizer, rank, step)
        optimizer.zero_grad()
        if rank == 1:
            change(model)
        with pytest.raises(RuntimeError if rank == 1 else WorkerError, match=words):
            optimizer.step()

    together(2, fn)


def test_two_wrappers_around_one_parameter() -> None:
    """The later one trains, from the earlier one's x; the earlier one says who has it now."""

    def fn(rank: int) -> None:
        run = Run(rank).step(3)
        x = bits(run.x())
        later = hvd_saef.DistributedOptimizer(sgd(run.parameters[:2]))
        assert bits([p.detach() for p in run.parameters]) == x
        with pytest.raises(RuntimeError, match=r"'noname\.0\.0' was wrapped again"):
            run.step()
        with pytest.raises(RuntimeError, match="was wrapped again"):
            run.optimizer.flush()
        run.set_gradients()
        later.step()
        assert later.stats()["rounds"] == 1

    together(2, fn)


def test_another_thread() -> None:
    def fn(rank: int) -> None:
        run = Run(rank).step(2)
        before = everything(run)
        raised: list[Exception] = []

        def use() -> None:
            try:
                run.set_gradients()
                run.optimizer.step()
            except Exception as error:
                raised.append(error)

        thread = threading.Thread(target=use, name="loader")
        thread.start()
        thread.join()
        assert isinstance(raised[0], RuntimeError)
        assert "is used in 'loader'" in str(raised[0])
        assert everything(run) == before
        run.step()

    together(2, fn)


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_a_forked_process() -> None:
    """Is refused at once, and waits for nobody; the process itself goes on."""

    def fn(rank: int) -> None:
        run = Run(rank).step(2)
        run.set_gradients()
        if rank == 0:
            reader, writer = os.pipe()
            if (pid := os.fork()) == 0:
                try:
                    run.optimizer.step()
                except RuntimeError as error:
                    os.write(writer, str(error).encode())
                os._exit(0)
            os.close(writer)
            with open(reader) as pipe:
                assert "was forked from one that had called" in pipe.read()
            os.waitpid(pid, 0)
        run.optimizer.step()

    together(2, fn)


def test_no_gradient_at_all_is_warned_of_once() -> None:
    def fn(rank: int, early: bool) -> None:
        job = Job(rank, nn.Linear(3, 2)).step()
        for _ in range(2):
            job.model(torch.ones(4, 3)).sum().backward()
            if early and rank == 1:
                job.optimizer.zero_grad()
            job.optimizer.step()

    said = [(rank, text) for rank, text in warned(2, lambda rank: fn(rank, True)) if "no gradient" in text]
    assert [rank for rank, _ in said] == [1]
    assert "zero_grad() between backward() and step()" in said[0][1]
    assert not [text for _, text in warned(2, lambda rank: fn(rank, False)) if "no gradient" in text]


def test_after_eval_a_step_is_refused_and_gradients_at_x_are_warned_of() -> None:
    def fn(rank: int) -> None:
        job = Job(rank, nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))).step(2)
        job.optimizer.eval()
        with pytest.raises(RuntimeError, match=r"Call optimizer.train\(\) before"):
            job.optimizer.step()
        job.optimizer.train()
        job.model.eval()  # and left on
        job.model(torch.ones(4, 3)).sum().backward()
        job.optimizer.step()

    said = [text for _, text in warned(2, fn) if "eval mode during the forward pass" in text]
    assert len(said) == 2


@pytest.mark.parametrize("options", [{}, {"overlap": True}], ids=str)
def test_a_second_optimizer_over_other_parameters_works(options: dict[str, Any]) -> None:
    """Step for step the same as each alone."""

    def one(rank: int, models: list[nn.Module]) -> list[bytes]:
        optimizers = [
            hvd_saef.DistributedOptimizer(sgd(list(m.parameters())), m.named_parameters(), model=m, **options)
            for m in models
        ]
        for step in range(4):
            for model, optimizer in zip(models, optimizers, strict=True):
                train(model, optimizer, rank, step)
        return [value for model in models for value in bits(dict(model.state_dict())).values()]

    both = together(2, lambda rank: one(rank, [network(), network(seed=1)]))
    apart = together(2, lambda rank: one(rank, [network()]) + one(rank, [network(seed=1)]))
    assert both == apart


def test_wrapping_and_dropping_leaves_no_owner() -> None:
    from hvd_saef.round import owners

    def fn(rank: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Run(rank).step()

    before = len(owners._of_parameters)
    together(2, fn)
    import gc

    gc.collect()
    assert len(owners._of_parameters) <= before
