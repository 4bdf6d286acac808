"""States loaded while training, in part or without ours: what was not loaded stands at x, not at b."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tests.workers import NO_MODEL, Job, Run, bits, sgd, together, warned

pytestmark = pytest.mark.filterwarnings(
    NO_MODEL, "ignore:a state was loaded into the model", "ignore:a state without"
)

OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "in a round": {"local_steps": 3},
    "ef": {"feedback": "ef", "local_steps": 2},
    "beta": {"server": "replicated", "server_step_ahead": 1.0},
}


def slow(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)


def trained(rank: int, steps: int = 4, **options: Any) -> Job:
    """A job of some layers, in the middle of a round where there are local steps."""
    model: Any = nn.Sequential(
        nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
    )
    return Job(rank, model, slow, **options).step(steps)


def part_of(job: Job) -> Any:
    return job.model


def ours(job: Job) -> Any:
    return job.optimizer.state_dict()["hvd_saef"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "how", ["strict=False", "a part", "a part of a part", "an outer module", "two parts"]
)
def test_what_is_not_loaded_stays_at_x(how: str, workers: int, options: dict[str, Any]) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        job = trained(rank, **options)
        expected = copy.deepcopy(ours(job)["x"])
        new = {name: torch.full_like(value, 0.25) for name, value in job.model.named_parameters()}
        job.model.train()
        job.model(torch.ones(2, 3))  # the parameters are at the training point
        if how == "strict=False":
            loaded = {name: new[name] for name in ("0.weight", "2.bias")}
            job.model.load_state_dict(loaded, strict=False)
        elif how == "a part":
            loaded = {name: value for name, value in new.items() if name.startswith("1.")}
            part_of(job)[1].load_state_dict({name[2:]: value for name, value in loaded.items()})
        elif how == "a part of a part":
            loaded = {name: value for name, value in new.items() if name.startswith("1.0.")}
            part_of(job)[1][0].load_state_dict({name[4:]: value for name, value in loaded.items()})
        elif how == "an outer module":
            loaded = {"2.weight": new["2.weight"]}
            outer = nn.ModuleDict({"inner": job.model, "other": nn.Linear(1, 1)})
            outer.load_state_dict({"inner.2.weight": new["2.weight"]}, strict=False)
        else:
            loaded = {name: value for name, value in new.items() if name[0] in "02"}
            for part in "02":
                state = {name[2:]: value for name, value in loaded.items() if name[0] == part}
                part_of(job)[int(part)].load_state_dict(state)
        expected |= loaded
        assert bits(dict(job.model.named_parameters())) == bits(dict(expected))
        job.model(torch.ones(2, 3))  # and the next forward pass does not undo it
        assert bits(dict(job.model.state_dict())) == bits(dict(expected))
        job.optimizer.param_groups[0]["lr"] = 0.0
        job.step(3)
        assert job.optimizer.stats()["error_norm"] == 0
        assert bits(dict(job.model.state_dict())) == bits(dict(expected))
        job.optimizer.param_groups[0]["lr"] = 1e-4
        return job.step(3).seen()

    first, *others = together(workers, fn)
    if options.get("local_steps", 1) != 2:
        assert all(other == first for other in others)


def test_one_load_is_told_of_once() -> None:
    def fn(rank: int) -> None:
        job = trained(rank, local_steps=3)
        job.model.load_state_dict({name: p + 1 for name, p in job.model.state_dict().items()})
        job.step(1)
        with pytest.raises(RuntimeError, match="Missing key"):
            part_of(job)[1].load_state_dict({"0.weight": torch.zeros(2, 4)})
        job.step(1)

    told = [text for _, text in warned(1, fn) if "loaded into the model" in text]
    assert len(told) == 2, told
    assert "errors are cleared, with 1 local step since the last round" in told[0]
    assert "errors are cleared, with 1 local step since the last round" in told[1]


def test_the_same_state_in_the_middle_of_a_round_changes_nothing() -> None:
    """The point that local steps reached is kept, whichever part is loaded."""

    def fn(rank: int, load: bool) -> dict[str, bytes]:
        job = trained(rank, 4, local_steps=3)
        if load:
            job.model.load_state_dict(copy.deepcopy(job.model.state_dict()))
            part_of(job)[0].load_state_dict(copy.deepcopy(part_of(job)[0].state_dict()))
        return job.step(4).seen()

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_plain_optimizers_state_leaves_x(
    workers: int, options: dict[str, Any], model: bool, mode: str
) -> None:
    """What b or local steps had made of the parameters is no x; what the user wrote into them is."""

    def fn(rank: int) -> dict[str, bytes]:
        job = trained(rank, **options) if model else None
        run = None if model else Run(rank, sgd, **options).step(4)
        held: Any = job or run
        names = list(held.optimizer.state_dict()["hvd_saef"]["x"])
        expected = dict(copy.deepcopy(held.optimizer.state_dict()["hvd_saef"]["x"]))
        parameters = [p for group in held.optimizer.param_groups for p in group["params"]]
        getattr(held.optimizer, mode)()
        with torch.no_grad():
            parameters[1].fill_(0.5)
        expected[names[1]] = torch.full_like(parameters[1], 0.5)
        held.optimizer.load_state_dict(copy.deepcopy(held.inner.state_dict()))
        assert bits(dict(zip(names, parameters, strict=True))) == bits(expected)
        held.optimizer.train()
        held.optimizer.param_groups[0]["lr"] = 0.0
        held.step(3)  # workers agree on x, or this is a ConsensusError
        assert bits(dict(held.optimizer.state_dict()["hvd_saef"]["x"])) == bits(expected)
        return bits(expected)

    first, *others = together(workers, fn)
    assert all(other == first for other in others)


def test_a_state_without_ours_says_what_is_gone() -> None:
    def fn(rank: int) -> None:
        run = Run(rank, sgd, local_steps=3).step(5)
        run.optimizer.load_state_dict(copy.deepcopy(run.inner.state_dict()))
        run.step(1)

    told = [(rank, text) for rank, text in warned(2, fn) if "without 'hvd_saef'" in text]
    assert sorted(rank for rank, _ in told) == [0, 1]  # it may be loaded on one alone
    assert "errors are cleared, with 2 local steps since the last round" in told[0][1]
    assert "save_checkpoint" in told[0][1]


@pytest.mark.parametrize("steps", [0, 2])
def test_a_resumed_state_without_ours_in_a_new_optimizer(steps: int) -> None:
    """One word on rank 0; none, if it has taken no step yet."""

    def fn(rank: int) -> None:
        state = Run(rank, sgd).step(steps).inner.state_dict()
        Run(rank, sgd).optimizer.load_state_dict(copy.deepcopy(state))

    told = [rank for rank, text in warned(3, fn) if "without 'hvd_saef'" in text]
    assert told == ([0] if steps else [])


def test_no_word_where_there_is_nothing_to_lose() -> None:
    def fn(rank: int) -> None:
        from hvd_saef import Compression

        dense: dict[str, Any] = {"feedback": "none", "compression": Compression.none}
        run = Run(rank, sgd, **dense).step(2)
        run.optimizer.load_state_dict(copy.deepcopy(run.inner.state_dict()))
        run.step(1)

    with warnings.catch_warnings():
        told = [text for _, text in warned(2, fn) if "without 'hvd_saef'" in text]
    assert not told


@pytest.mark.parametrize("alone", [0, 1])
@pytest.mark.parametrize("call", ["step", "reanchor"])
def test_a_plain_state_on_some_ranks_alone(alone: int, call: str) -> None:
    """All ranks count rounds as the rank whose parameters they take: they average in the same rounds."""

    def fn(rank: int) -> tuple[float, dict[str, bytes]]:
        run = Run(rank, sgd, averaging_period=3, warmup_steps=1).step(2)
        if rank == alone:
            run.optimizer.load_state_dict(copy.deepcopy(run.inner.state_dict()))
        if call == "reanchor":
            run.optimizer.reanchor()
        run.step(4)
        return run.optimizer.stats()["rounds"], bits(run.optimizer.state_dict()["hvd_saef"]["x"])

    first, second = together(2, fn)
    assert first == second
    assert first[0] == (4 if call == "step" or alone == 0 else 6)


def test_a_broadcast_after_loading_changes_nothing() -> None:
    """It writes rank 0's training point into all parameters, without raising their versions, as Horovod's."""

    def fn(rank: int, broadcast: bool) -> dict[str, bytes]:
        run = Run(rank, sgd, local_steps=3).step(4)
        state = copy.deepcopy(run.optimizer.state_dict())
        run.step(3).optimizer.load_state_dict(state)
        if broadcast:
            for parameter in run.parameters:
                parameter.data.copy_(torch.ones_like(parameter))
        run.optimizer.flush()
        return bits(run.step(4).optimizer.state_dict()["hvd_saef"]["x"])

    assert together(2, lambda rank: fn(rank, True)) == together(2, lambda rank: fn(rank, False))


@pytest.mark.parametrize("again", [False, True], ids=["", "and saved again"])
@pytest.mark.parametrize("after", [{}, {"feedback": "ef"}, {"double_compression": False}], ids=str)
@pytest.mark.parametrize("ranks", [[0], [0, 1]], ids=str)
@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_written_after_loading_is_kept(
    steps: int, ranks: list[int], after: dict[str, Any], again: bool
) -> None:
    """By hand, at the training point, before the next step: x̃ goes there, as after any other step."""

    def fn(rank: int, written: float) -> Any:
        job = Job(rank, nn.Linear(3, 2), slow, server="replicated", local_steps=steps).step(4)
        job.optimizer.consolidate()
        state = copy.deepcopy(job.step(steps - 1).optimizer.state_dict())
        options = {"local_steps": steps} | after
        job = Job(rank, nn.Linear(3, 2), slow, **options)
        job.optimizer.param_groups[0]["lr"] = 0.0
        if rank in ranks:
            job.optimizer.load_state_dict(state)
            job.optimizer.param_groups[0]["lr"] = 0.0
            with torch.no_grad():
                next(job.model.parameters()).add_(written)
        if again:
            state = copy.deepcopy(job.optimizer.state_dict())
            job = Job(rank, nn.Linear(3, 2), slow, **options)
            job.optimizer.load_state_dict(state)
            job.optimizer.param_groups[0]["lr"] = 0.0
        job.step(2 * steps).optimizer.consolidate()
        ours = job.optimizer.state_dict()["hvd_saef"]
        flat = {name: piece["values"] for name, piece in ours["server_errors"].items()}
        return {
            name: x - ours["errors"][name] - (flat[name].view_as(x) if flat else 0)
            for name, x in ours["x"].items()
        }

    for with_it, without in zip(
        together(2, lambda rank: fn(rank, 0.5)), together(2, lambda rank: fn(rank, 0.0)), strict=True
    ):
        torch.testing.assert_close(with_it["weight"], without["weight"] + 0.5, rtol=0, atol=1e-5)
        torch.testing.assert_close(with_it["bias"], without["bias"], rtol=0, atol=1e-5)
