"""overlap=True, and what changes between two steps: loaded, added, announced; options set too late."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef.errors import ConfigurationMismatchError, WorkerError
from tests.round.test_overlap import Training, same
from tests.workers import caught, together

Change = Callable[[Any, Path], None]


def load_optimizer(training: Any, folder: Path) -> None:
    """An earlier state of the optimizer."""
    training.optimizer.load_state_dict(copy.deepcopy(training.saved["optimizer"]))


def load_both(training: Any, folder: Path) -> None:
    """An earlier state of the optimizer and of the model."""
    load_optimizer(training, folder)
    training.model.load_state_dict(training.saved["model"])


def load_model(training: Any, folder: Path) -> None:
    """Another state of the model: x is that."""
    training.model.load_state_dict({k: v / 2 for k, v in training.saved["model"].items()})


def load_checkpoint(training: Any, folder: Path) -> None:
    """What :func:`at_three` saved."""
    hvd_saef.load_checkpoint(folder, training.model, training.optimizer)


def add_group(training: Any, folder: Path) -> None:
    """A parameter that the loss takes from now on."""
    generator = torch.Generator().manual_seed(1)
    training.more = nn.Parameter(torch.randn(3, 50, generator=generator))
    training.optimizer.add_param_group({"params": [training.more], "lr": 0.02})


def freeze(training: Any, folder: Path) -> None:
    """A layer that was trained, which has no gradients from now on."""
    training.model[2].requires_grad_(False)


def unfreeze(training: Any, folder: Path) -> None:
    """A layer that was frozen after it was wrapped."""
    training.model[0].requires_grad_(True)


def reanchor(training: Any, folder: Path) -> None:
    """From where rank 0's parameters are."""
    training.optimizer.reanchor()


def add_and_flush(training: Any, folder: Path) -> None:
    """What was added is agreed on before the next backward."""
    add_group(training, folder)
    training.optimizer.flush()


CHANGES: list[Change] = [
    load_optimizer,
    load_both,
    load_model,
    load_checkpoint,
    add_group,
    freeze,
    unfreeze,
    reanchor,
    add_and_flush,
]


def at_three(rank: int, overlap: bool, change: Change, folder: Path, **options: Any) -> Any:
    """Some steps, a change after the third, and some more."""
    training: Any = Training(rank, overlap, check_consensus_every=1, **options)
    training.model[0].requires_grad_(change is not unfreeze)
    training.more, early = None, []
    for step in range(8):
        if step == 2:
            model, optimizer = training.model.state_dict(), training.optimizer.state_dict()
            training.saved = copy.deepcopy({"model": model, "optimizer": optimizer})
            hvd_saef.save_checkpoint(folder, training.model, training.optimizer)
        if step == 4:
            change(training, folder)
        training.backward()
        if training.more is not None:
            (training.more.square() * (rank + 1)).sum().backward()
        early.append(training.optimizer._saef.overlap.under_way)
        training.optimizer.step()
    return training.state(), early


@pytest.mark.filterwarnings("ignore:a state was loaded into the model")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("options", [{}, {"local_steps": 2}], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_has_the_bits_of_overlap_false(
    change: Change, options: dict[str, Any], ranks: int, tmp_path: Path
) -> None:
    """That round goes the ordinary way, and the next ones leave early again."""
    options = options | ({"worker": "node"} if ranks > 1 else {})
    runs = [
        together(2, lambda k: at_three(k, overlap, change, tmp_path / str(overlap), **options), ranks)  # noqa: B023
        for overlap in (False, True)
    ]
    for (expected, _), (found, early) in zip(*runs, strict=True):
        assert same(found, expected)
        assert any(early[:4])
        assert any(early[5:])


@pytest.mark.parametrize(
    "change", [load_optimizer, load_model, add_group], ids=lambda change: change.__name__
)
def test_on_one_rank_alone_all_are_told(change: Change, tmp_path: Path) -> None:
    def fn(rank: int) -> None:
        def on_one(training: Any, folder: Path) -> None:
            if rank == 1:
                change(training, folder)

        at_three(rank, True, on_one, tmp_path)

    for failure in caught(2, fn):
        assert isinstance(failure, RuntimeError)
        wanted = "the number of parameters" if change is add_group else "on some ranks alone"
        assert wanted in str(failure)


def test_added_between_backward_and_step() -> None:
    """Refused, and nothing was added."""

    def fn(rank: int) -> list[Tensor]:
        training = Training(rank).steps(2)
        training.backward()
        with pytest.raises(RuntimeError, match="between backward and step"):
            training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        training.optimizer.step()
        return training.steps(2).state()

    plain = together(2, lambda k: Training(k, overlap=False).steps(5).state())
    assert all(same(a, b) for a, b in zip(together(2, fn), plain, strict=True))


# -- the number of backward passes ------------------------------------------------------------------


@pytest.mark.parametrize("local_steps", [1, 2])
def test_another_number_of_passes_is_heeded(local_steps: int) -> None:
    def fn(rank: int, overlap: bool) -> tuple[list[Tensor], list[bool]]:
        training, early = Training(rank, overlap, local_steps=local_steps), []
        for passes, steps in ((1, 4), (3, 6), (2, 6)):
            training.optimizer.set_backward_passes_per_step(passes)
            for _ in range(steps):
                training.backward(passes)
                early.append(training.under_way)
                training.optimizer.step()
        return training.state(), early

    plain = together(2, lambda k: fn(k, False))
    for (found, early), (expected, _) in zip(together(2, lambda k: fn(k, True)), plain, strict=True):
        assert same(found, expected)
        assert any(early[:4])
        assert any(early[4:10])
        assert any(early[10:])


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("after", [0, 3])
def test_different_numbers_of_passes_are_told(overlap: bool, after: int) -> None:
    def fn(rank: int) -> None:
        training = Training(rank, overlap).steps(after)
        training.optimizer.set_backward_passes_per_step(2 + (rank == 1))
        training.backward(2)
        training.optimizer.step()

    for failure in caught(3, fn):
        assert isinstance(failure, ConfigurationMismatchError)
        assert "backward_passes_per_step: 2 on ranks 0, 2, 3 on rank 1" in str(failure)


@pytest.mark.parametrize(("passes", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_no_number_of_passes(passes: Any, error: type[Exception]) -> None:
    def fn(rank: int) -> None:
        Training(rank).optimizer.set_backward_passes_per_step(passes)

    (failure,) = caught(1, fn)
    assert isinstance(failure, error)
    assert f"backward_passes_per_step={passes!r}" in str(failure)


# -- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["lr", "weight_decay", "betas"])
@pytest.mark.parametrize("who", [(0, 1), (1,)], ids=["all ranks", "one rank"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_options_changed_after_backward(option: str, who: tuple[int, ...], ranks: int) -> None:
    """Early buckets have used what they were: an error on all ranks, with x as it was, that says so."""
    values = {"lr": 0.5, "weight_decay": 0.2, "betas": (0.5, 0.9)}

    def fn(rank: int) -> str:
        training = Training(rank, worker="node" if ranks > 1 else "rank").steps(3)
        before = [x.clone() for x in training.optimizer.state_dict()["hvd_saef"]["x"].values()]
        training.backward()
        assert training.optimizer._saef.overlap.under_way
        if rank in who:
            training.optimizer.param_groups[0][option] = values[option]
        with pytest.raises(RuntimeError) as raised:
            training.optimizer.step()
        assert same(list(training.optimizer.state_dict()["hvd_saef"]["x"].values()), before)
        assert rank in who or isinstance(raised.value, WorkerError)
        return str(raised.value)

    for said in together(2, fn, ranks):
        assert f"the option {option!r} of a parameter group was changed between backward and step()" in said
        assert "overlap=False" in said


def test_options_changed_during_backward() -> None:
    """By a hook on a gradient, say: some buckets have used what they were."""

    def fn(rank: int) -> None:
        training = Training(rank).steps(3)
        first = next(training.model.parameters())
        first.register_hook(lambda _: training.optimizer.param_groups[0].update(lr=0.5))
        training.backward()
        training.optimizer.step()

    assert all("the option 'lr'" in str(failure) for failure in caught(2, fn))


@pytest.mark.parametrize("tensor", [False, True])
def test_options_set_in_every_step(tensor: bool) -> None:
    """Before the forward pass, or after step(): the bits of overlap=False."""

    def fn(rank: int, overlap: bool) -> list[Tensor]:
        training = Training(rank, overlap)
        for step in range(6):
            rate = 0.01 / (step + 1)
            training.optimizer.param_groups[0]["lr"] = torch.tensor(rate) if tensor else rate
            training.backward()
            training.optimizer.step()
            training.optimizer.param_groups[0]["weight_decay"] = 0.1 * step
        return training.state()

    plain = together(2, lambda k: fn(k, False))
    assert all(same(a, b) for a, b in zip(together(2, lambda k: fn(k, True)), plain, strict=True))
