"""What is saved can be loaded: NumPy's numbers become Python's; what would not load is refused in time."""

from __future__ import annotations

import argparse
import enum
import io
import random
import re
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hvd_saef import CheckpointError, ConfigurationMismatchError, load_checkpoint, save_checkpoint
from hvd_saef.checkpoints.loadable import as_loadable
from tests.checkpoints.test_checkpoint import Job
from tests.workers import NO_MODEL, Run, adamw, caught, saved, together

pytestmark = pytest.mark.filterwarnings("ignore:the largest block", NO_MODEL)


class Color(enum.IntEnum):
    RED = 1


class Score:
    """Something of the user's."""


NUMBERS: dict[str, tuple[Any, Any]] = {
    "float64": (np.float64(0.1), 0.1),
    "float32": (np.float32(0.25), 0.25),
    "int64": (np.int64(7), 7),
    "bool": (np.bool_(True), True),
    "complex": (np.complex128(1 + 2j), 1 + 2j),
    "string": (np.str_("best"), "best"),
    "within": ({"a": [1, (np.float64(2.5), "x")]}, {"a": [1, (2.5, "x")]}),
    "a key": ({np.int64(3): "three"}, {3: "three"}),
    "ordered": (OrderedDict(b=np.float32(1.0)), OrderedDict(b=1.0)),
}
PLAIN: dict[str, Any] = {
    "nothing": None,
    "random state": random.getstate(),
    "tuple keys": {(0, "a"): [1.5]},
    "counter": Counter({10: 2}),
    "sizes": torch.Size([1, 2]),
    "dtype": torch.bfloat16,
    "sparse": torch.eye(3).to_sparse(),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "random state of NumPy": (
        np.random.RandomState(0).get_state(),
        r"extra\['odd'\]\[1\] is a numpy.ndarray.*torch.from_numpy\(array\), or array.tolist\(\)",
    ),
    "path": (Path("here"), r"extra\['odd'\] is a pathlib.*PosixPath.*save str\(path\)"),
    "deep": ({"a": [{"b": np.zeros(3)}]}, r"extra\['odd'\]\['a'\]\[0\]\['b'\] is a numpy.ndarray"),
    "a key": ({Path("here"): 1}, r"the key PosixPath\('here'\) of extra\['odd'\] is a pathlib"),
    "namespace": (argparse.Namespace(lr=1), r"extra\['odd'\] is a argparse.Namespace"),
    "enum": (Color.RED, r"extra\['odd'\] is a .*Color"),
    "user's": ([Score()], r"extra\['odd'\]\[0\] is a .*Score"),
    "module": (nn.Linear(1, 1), r"extra\['odd'\] is a .*Linear.*save its state_dict\(\)"),
    "long double": (np.longdouble(1), r"extra\['odd'\] is a numpy.longdouble"),
}


def refused_by_torch(value: Any) -> bool:
    """Whether the torch at hand, which may be old, does not load `value`: then it is refused by name."""
    file = io.BytesIO()
    torch.save(value, file)
    try:
        for device in ("cpu", "meta"):
            file.seek(0)
            torch.load(file, map_location=device, weights_only=True)
    except Exception:
        with pytest.raises(CheckpointError, match=f"it is a .*{type(value).__name__}, which would not load"):
            as_loadable(value, "it")
        return True
    return False


@pytest.mark.parametrize(("value", "python"), NUMBERS.values(), ids=NUMBERS)
def test_numpys_numbers_become_pythons(value: Any, python: Any, tmp_path: Path) -> None:
    if refused_by_torch(python):
        pytest.skip(f"needs a torch.load(weights_only=True) that takes a {type(python).__name__}")

    def fn(rank: int) -> None:
        job = Job(rank).step(1)
        save_checkpoint(tmp_path, job.model, job.optimizer, value=value)
        found = load_checkpoint(tmp_path, job.model, job.optimizer)["value"]
        assert repr(found) == repr(python)

    together(2, fn)


@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_what_torch_loads_is_kept_as_it_is(value: Any, tmp_path: Path) -> None:
    if refused_by_torch(value):
        pytest.skip(f"needs a torch.load(weights_only=True) that takes a {type(value).__name__}")
    assert as_loadable(value, "it") is value

    def fn(rank: int) -> None:
        job = Job(rank).step(1)
        save_checkpoint(tmp_path, job.model, job.optimizer, value=value)
        assert repr(load_checkpoint(tmp_path, job.model, job.optimizer)["value"]) == repr(value)

    together(1, fn)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("value", "words"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_load_is_refused_before_the_old_set_goes(
    value: Any, words: str, ranks: int, tmp_path: Path
) -> None:
    """On one rank of all, whether its worker has one rank or several: an error on all, by its place."""
    options: dict[str, Any] = {} if ranks == 1 else {"worker": "node"}

    def fn(rank: int) -> None:
        job = Job(rank, **options).step(1).save(tmp_path)
        job.step(2)
        try:
            save_checkpoint(tmp_path, job.model, job.optimizer, odd=value if rank == 1 else None)
        finally:
            assert Job(rank, seed=3, **options).load(tmp_path).taken == 1

    before: list[str] = []
    for failure in caught(2, fn, ranks):
        assert isinstance(failure, CheckpointError), repr(failure)
        assert re.search(f"rank 1: {words}", str(failure)), str(failure)
        before.append(str(failure))
    assert len(before) == 2 * ranks
    assert len(list(tmp_path.iterdir())) == 3


def test_a_value_that_holds_itself() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(CheckpointError, match="it contains itself"):
        as_loadable(endless, "it")


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_a_learning_rate_of_numpys(kind: Any, tmp_path: Path) -> None:
    """As in `group["lr"] = 0.1 * np.cos(...)`: checkpoints and state dicts load, and go on to the bit."""

    def fn(rank: int) -> None:
        job = Job(rank)
        for step in range(3):
            for group in job.inner.param_groups:
                group["lr"] = kind(0.02) * np.cos(kind(step))
            job.step()
        job.save(tmp_path)
        state = saved(job.optimizer.state_dict())
        assert type(state["param_groups"][0]["lr"]) is float
        again = Job(rank, seed=1).load(tmp_path)
        assert type(again.optimizer.param_groups[0]["lr"]) is float
        assert again.step(2).seen() == job.step(2).seen()

    together(2, fn)


def test_state_dicts_load_whatever_numpy_numbers_the_optimizer_holds() -> None:
    def fn(rank: int) -> None:
        run = Run(rank, adamw).step(2)
        run.inner.param_groups[0]["betas"] = (np.float64(0.9), np.float32(0.5))
        run.inner.param_groups[0][f"mine {rank}"] = {"deep": [np.int64(3)]}
        group = saved(run.optimizer.state_dict())["param_groups"][0]
        assert repr(group["betas"]) == "(0.9, 0.5)"
        assert repr(group[f"mine {rank}"]) == "{'deep': [3]}"
        held = [id(one) for one in run.optimizer.state_dict()["state"].values()]
        assert held == [id(one) for one in run.inner.state.values()]  # Horovod's broadcast writes into them

    together(2, fn)


class Versioned(nn.Module):
    """Loads states of its first version in another way, as modules of torch do."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
        if metadata.get("version") != 2:
            raise LookupError(f"a state of version {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *args)


def test_versions_of_modules_are_kept(tmp_path: Path) -> None:
    def fn(rank: int) -> None:
        job = Job(rank)
        job.model.add_module("versioned", Versioned())
        save_checkpoint(tmp_path, job.model, job.optimizer, best=np.float64(1))
        load_checkpoint(tmp_path, job.model, job.optimizer)

    together(2, fn)


def test_extra_state_of_modules_is_looked_at(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def get_extra_state(self) -> Any:
            return {"history": np.zeros(2)}

        def set_extra_state(self, state: Any) -> None: ...

    def fn(rank: int) -> None:
        job = Job(rank)
        job.model.add_module("odd", Odd())
        save_checkpoint(tmp_path, job.model, job.optimizer)

    for failure in caught(2, fn):
        failure_text = str(failure)
        assert "model['odd._extra_state']['history'] is a numpy.ndarray" in failure_text


def test_ranks_that_train_other_parameters_replace_no_checkpoint(tmp_path: Path) -> None:
    """What they would write, no job could load."""

    def fn(rank: int) -> None:
        run = Run(rank, lambda parameters: torch.optim.SGD(parameters[:2], lr=0.05)).step(1)
        model = nn.ParameterList(run.parameters)
        save_checkpoint(tmp_path, model, run.optimizer)
        if rank == 1:
            run.optimizer.add_param_group({"params": run.parameters[2:]})
        with pytest.raises(
            ConfigurationMismatchError, match="number of parameters: 2 on rank 0, 4 on rank 1"
        ):
            save_checkpoint(tmp_path, model, run.optimizer)
        again = Run(rank, lambda parameters: torch.optim.SGD(parameters[:2], lr=0.05))
        load_checkpoint(tmp_path, nn.ParameterList(again.parameters), again.optimizer)
        assert again.optimizer.stats()["rounds"] == 1

    together(2, fn)
