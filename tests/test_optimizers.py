"""Every optimizer of torch.optim, wrapped: from a fresh start and from a loaded state."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_saef import Compression
from tests.older_torch import has, needs_optimizer
from tests.problems import curved_valley, start_point
from tests.workers import NO_MODEL, Run, bits, everything, together

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
]

Parameters = list[nn.Parameter]
Make = Callable[[Parameters], torch.optim.Optimizer]
O = torch.optim  # noqa: E741
IDENTITY: dict[str, Any] = {"compression": Compression.none, "feedback": "saef"}
DENSE: dict[str, Any] = {"compression": Compression.none, "feedback": "none"}
BEFORE = 5  # steps of a plain run whose state is loaded


def matrices(parameters: Parameters) -> Parameters:
    """What Muon takes."""
    return [parameter for parameter in parameters if parameter.ndim == 2]


def groups(parameters: Parameters) -> list[dict[str, Any]]:
    """Three groups that differ in what they say."""
    return [
        {"params": parameters[:1], "weight_decay": 0.2},
        {"params": parameters[1:3], "lr": 0.2},
        {"params": parameters[3:], "lr": 0.001, "weight_decay": 0.0},
    ]


MAKES: dict[str, Make] = {
    "SGD": lambda p: O.SGD(p, lr=0.05),
    "SGD nesterov": lambda p: O.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD groups": lambda p: O.SGD(groups(p), lr=0.05, momentum=0.9),
    "SGD maximize": lambda p: O.SGD(p, lr=0.001, momentum=0.5, dampening=0.5, maximize=True),
    "Adam": lambda p: O.Adam(p, lr=0.02),
    "Adam tensor lr": lambda p: O.Adam(p, lr=torch.tensor(0.02), foreach=False),
    "AdamW amsgrad": lambda p: O.AdamW(p, lr=0.02, amsgrad=True),
    "AdamW groups": lambda p: O.AdamW(groups(p), lr=0.05),
    "RMSprop": lambda p: O.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: O.Adagrad(p, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1),
    "Adadelta": lambda p: O.Adadelta(p, lr=1.0),
    "NAdam": lambda p: O.NAdam(p, lr=0.02),
    "RAdam": lambda p: O.RAdam(p, lr=0.02),
    "Adamax": lambda p: O.Adamax(p, lr=0.02),
    "Rprop": lambda p: O.Rprop(p, lr=0.01),
    "ASGD": lambda p: O.ASGD(p, lr=0.05, t0=3.0),
    "Adafactor": lambda p: O.Adafactor(p, lr=0.02),
    "Muon": lambda p: O.Muon(matrices(p), lr=0.02),
}


def variant(base: str, option: dict[str, bool]) -> Make:
    """One implementation of an optimizer."""
    return lambda parameters: getattr(O, base)(parameters, lr=0.02, **option)


VARIANTS: dict[str, Make] = {
    f"{base} {option}": variant(base, option)
    for base, kinds in {
        "SGD": ("foreach", "fused"),
        "Adam": ("foreach", "fused"),
        "AdamW": ("foreach", "fused"),
        "Adagrad": ("foreach", "fused"),
        "RMSprop": ("foreach",),
        "Adadelta": ("foreach",),
        "NAdam": ("foreach",),
        "RAdam": ("foreach",),
        "Adamax": ("foreach",),
        "Rprop": ("foreach",),
        "ASGD": ("foreach",),
        "Adafactor": ("foreach",),
    }.items()
    for option in [{"foreach": False}, *({kind: True} for kind in kinds)]
}


def case(name: str, *others: Any) -> Any:
    """What a test is called with, which is skipped where torch does not have that optimizer."""
    return pytest.param(name, *others, marks=needs_optimizer(name.split()[0], fused="fused" in name))


def test_every_optimizer_is_here() -> None:
    """PyTorch may get more of them."""
    known = {name.split()[0] for name in MAKES} | {"LBFGS", "SparseAdam", "Optimizer"}
    found = {name for name, kind in vars(O).items() if isinstance(kind, type) and name[0] != "_"}
    assert found == {name for name in known if has(f"optim.{name}")}


@dataclass
class Plain:
    """Where torch alone came to."""

    parameters: list[Tensor]
    state: dict[str, Any]


def plain(make: Make, steps: int, after: Plain | None = None, zeros: bool = False) -> Plain:
    """Steps of torch's optimizer, on worker 0's gradients; `after` earlier ones.

    `zeros`: a gradient that is missing is zero, as it is where Horovod averages gradients.
    """
    parameters = [nn.Parameter(torch.tensor(array)) for array in start_point()]
    optimizer = make(parameters)
    if after is not None:
        put(parameters, after)
        optimizer.load_state_dict(copy.deepcopy(after.state))
    taken = BEFORE if after is not None else 0
    for step in range(taken, taken + steps):
        at = [p.detach().numpy().copy() for p in parameters]
        for p, slope in zip(parameters, curved_valley(0, step, at), strict=True):
            missing = torch.zeros_like(p) if zeros else None
            p.grad = missing if slope is None else torch.tensor(slope)
        optimizer.step()
    return Plain([p.detach() for p in parameters], optimizer.state_dict())


@torch.no_grad()
def put(parameters: Parameters, reached: Plain) -> None:
    """Set parameters to where a plain run came to."""
    for parameter, value in zip(parameters, reached.parameters, strict=True):
        parameter.copy_(value)


def wrapped(rank: int, make: Make, after: Plain | None, load_wrapped: bool, **options: Any) -> Run:
    """A float64 run, fresh or after a plain one, whose state is loaded before or after wrapping."""

    def make_and_load(parameters: Parameters) -> torch.optim.Optimizer:
        optimizer = make(parameters)
        if after is not None:
            put(parameters, after)
            if not load_wrapped:
                optimizer.load_state_dict(copy.deepcopy(after.state))
        return optimizer

    run = Run(rank, make_and_load, dtype=torch.float64, **options)
    if after is not None:
        run.taken = BEFORE
        if load_wrapped:
            run.optimizer.load_state_dict(copy.deepcopy(after.state))
    return run


def assert_close(ours: Any, theirs: Any, at: str) -> None:
    """Nested values, equal to rounding; structure and everything that is no tensor, exactly."""
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, msg=lambda text: f"{at}: {text}")
    elif isinstance(theirs, dict):
        assert set(ours) == set(theirs), at
        for key, value in theirs.items():
            assert_close(ours[key], value, f"{at}/{key}")
    elif isinstance(theirs, list):
        for i, (mine, value) in enumerate(zip(ours, theirs, strict=True)):
            assert_close(mine, value, f"{at}/{i}")
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-11, abs=1e-12), at
    else:
        assert ours == theirs, at


STARTS = ["fresh", "wrapped after loading", "loaded when wrapped"]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", map(case, MAKES))
def test_one_worker_without_compression_is_torch(name: str, start: str) -> None:
    """To rounding with feedback (x - (x - y) rounds), to the bit without. State and groups too."""
    make = MAKES[name]
    after = None if start == "fresh" else plain(make, BEFORE)

    def fn(rank: int) -> None:
        for options in (IDENTITY, DENSE):
            expected = plain(make, 10, after, zeros=options is DENSE)
            run = wrapped(rank, make, after, start == "loaded when wrapped", **options).step(10)
            assert isinstance(run.optimizer, type(run.inner))
            ours = run.optimizer.state_dict()
            del ours["hvd_saef"]
            assert_close([p.detach() for p in run.parameters], expected.parameters, "parameters")
            assert_close(ours, expected.state, "state")
            if options is DENSE:
                assert bits([run.parameters, ours]) == bits([expected.parameters, expected.state])

    together(1, fn)


@pytest.mark.parametrize("name", map(case, VARIANTS))
def test_implementations_give_what_they_give_unwrapped(name: str) -> None:
    def fn(rank: int) -> None:
        for options in (IDENTITY, DENSE):
            expected = plain(VARIANTS[name], 10, zeros=options is DENSE)
            run = wrapped(rank, VARIANTS[name], None, False, **options).step(10)
            assert_close([p.detach() for p in run.parameters], expected.parameters, "parameters")
            assert_close(run.optimizer.state_dict()["state"], expected.state["state"], "state")

    together(1, fn)


@dataclass
class Seen:
    """What one worker saw of a round: its update b - y, and x, e and its pieces of s afterwards."""

    update: list[Tensor]
    x: dict[str, Tensor]
    e: dict[str, Tensor]
    s: dict[str, dict[str, Any]]


def auxiliary(workers: tuple[Seen, ...]) -> list[Tensor]:
    """The point x - (s + mean e)."""
    points = []
    for name, x in workers[0].x.items():
        s = torch.zeros(x.numel(), dtype=x.dtype)
        for seen in workers:
            if name in seen.s:
                start, values = seen.s[name]["start"], seen.s[name]["values"]
                s[start : start + values.numel()] = values
        points.append(x - s.view(x.shape) - sum(seen.e[name] for seen in workers) / len(workers))
    return points


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("name", "workers"), [case(n, k) for i, n in enumerate(MAKES) for k in (2, (1, 4)[i % 2])]
)
def test_with_compression_nothing_is_lost(name: str, workers: int, start: str) -> None:
    """All workers have the same x; the auxiliary point moves by the mean of what the optimizers did."""
    after = None if start == "fresh" else plain(MAKES[name], BEFORE)

    def fn(rank: int) -> list[Seen]:
        run = wrapped(rank, MAKES[name], after, start == "loaded when wrapped")
        held = [p for group in run.inner.param_groups for p in group["params"]]
        ends: list[list[Tensor]] = []
        run.inner.register_step_post_hook(lambda *_: ends.append([p.detach().clone() for p in held]))
        seen = [Seen([torch.zeros_like(p) for p in held], dict(enumerate_names(held)), {}, {})]
        seen[0].e = {key: torch.zeros_like(x) for key, x in seen[0].x.items()}
        for _ in range(8):
            b = [p.detach().clone() for p in held]
            run.step()
            update = [start - end for start, end in zip(b, ends.pop(), strict=True)]
            ours = copy.deepcopy(run.optimizer.state_dict()["hvd_saef"])
            seen.append(Seen(update, ours["x"], ours["errors"], ours["server_errors"]))
            for key, p in zip(ours["x"], held, strict=True):
                assert torch.equal(p, ours["x"][key] - ours["errors"][key])
            state = run.optimizer.state_dict()["state"]
            assert all(set(value) == kinds[key] for key, value in state.items())
        assert run.optimizer.stats()["error_norm"] > 0
        return seen

    kinds = {key: set(value) for key, value in plain(MAKES[name], 2, after).state["state"].items()}
    rounds = list(zip(*together(workers, fn), strict=True))
    for before, now in itertools.pairwise(rounds):
        assert all(bits(seen.x) == bits(now[0].x) for seen in now)
        updates = zip(*(seen.update for seen in now), strict=True)
        for old, new, update in zip(auxiliary(before), auxiliary(now), updates, strict=True):
            torch.testing.assert_close(new, old - sum(update) / workers, rtol=0, atol=1e-12)
    assert bits(rounds[0][0].x) != bits(rounds[-1][0].x)


def enumerate_names(parameters: Parameters) -> list[tuple[str, Tensor]]:
    """Copies of parameters, each under a name of its own."""
    return [(str(i), p.detach().clone()) for i, p in enumerate(parameters)]


def test_no_warnings_with_any_optimizer() -> None:
    def fn(rank: int) -> None:
        for make in [make for name, make in MAKES.items() if has(f"optim.{name.split()[0]}")]:
            before = everything(run := Run(rank, make, feedback="ef"))
            assert everything(run.step(2)) != before

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*divides each of the 2 workers")  # advice, for some
        together(2, fn)
