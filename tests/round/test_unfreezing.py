"""Frozen parameters are left alone until they require a gradient; then they are taken in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvd_saef
from hvd_saef import CheckpointError, Compression, ConfigurationMismatchError, ConsensusError, WorkerError
from tests.round.test_growth import DENSE, SETTINGS, grown, halves
from tests.workers import NO_MODEL, Job, Run, bits, caught, everything, saved, together, warned

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
]


class Thawing(Run):
    """A run of two groups, the second frozen at first, though gradients are at hand for it."""

    def __init__(self, rank: int, frozen: bool = True, seed: int = 0, **options: Any) -> None:
        def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            for parameter in parameters[2:]:
                parameter.requires_grad_(not frozen)
            return halves(parameters)

        super().__init__(rank, make, seed, **options)

    def set_gradients(self) -> None:
        """Only what requires a gradient gets one."""
        super().set_gradients()
        for parameter in self.parameters:
            if not parameter.requires_grad:
                parameter.grad = None

    def thaw(self, requires_grad: bool = True) -> Thawing:
        """Let the second group train from now on, or no longer."""
        for parameter in self.parameters[2:]:
            parameter.requires_grad_(requires_grad)
        return self


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_what_is_frozen_costs_nothing(options: dict[str, Any]) -> None:
    """As if it were not in the optimizer, to the byte."""

    def fn(rank: int, frozen: bool) -> tuple[dict[str, float], dict[str, bytes]]:
        run: Run = Thawing(rank, **options) if frozen else grown(rank, 0, **options)
        if not frozen:
            run = Run(rank, lambda p: torch.optim.SGD(p[:2], lr=0.05, momentum=0.9), **options)
        stats = run.step(4).optimizer.stats()
        ours = run.optimizer.state_dict()["hvd_saef"]
        assert set(ours.get("x", {})) == (set() if options is DENSE else {"noname.0.0", "noname.0.1"})
        return {key: n for key, n in stats.items() if "seconds" not in key}, bits([run.parameters[:2], ours])

    assert together(3, lambda rank: fn(rank, True)) == together(3, lambda rank: fn(rank, False))


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("before", [0, 4])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_unfreezing_is_as_adding_a_group(options: dict[str, Any], before: int, workers: int) -> None:
    twin = together(workers, lambda rank: everything(grown(rank, before, **options).step(5)))
    found = together(workers, lambda rank: everything(Thawing(rank, **options).step(before).thaw().step(5)))
    assert found == twin


@pytest.mark.parametrize("evaluating", [False, True])
def test_unfreezing_between_local_steps(evaluating: bool) -> None:
    """At once; and where eval() or a state dict comes first, the point reached stays what it was."""

    def fn(rank: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
        run = Thawing(rank, local_steps=3).step(4)
        if evaluating:
            run.optimizer.eval()
        run.thaw()
        if evaluating:
            state = run.optimizer.state_dict()["hvd_saef"]
            assert len(state["reached"]) == len(state["x"]) == 4
            run.optimizer.train()
        held = bits(run.parameters)
        run.set_gradients()
        assert bits(run.parameters) == held
        run.step(5)
        return bits(run.x()), held

    outcomes = together(3, fn)
    assert outcomes == together(3, fn)
    assert all(x == outcomes[0][0] for x, _ in outcomes)
    if evaluating:
        without = together(3, lambda rank: bits(Thawing(rank, local_steps=3).step(4).thaw().step(5).x()))
        assert [x for x, _ in outcomes] == without


def test_one_worker_disagrees() -> None:
    def fn(rank: int) -> None:
        run = Thawing(rank).step(2)
        if rank == 1:
            run.thaw()
        run.step()

    for failure in caught(3, fn):
        assert isinstance(failure, ConfigurationMismatchError), repr(failure)
        assert "whether 'noname.1.0' takes part: False on ranks 0, 2, True on rank 1" in str(failure)


def test_one_worker_froze_before_wrapping() -> None:
    for failure in caught(3, lambda rank: Thawing(rank, frozen=rank == 2).step()):
        assert isinstance(failure, ConfigurationMismatchError), repr(failure)
        assert "whether 'noname.1.0' takes part: True on ranks 0, 1, False on rank 2" in str(failure)


def test_other_values_on_one_worker() -> None:
    def fn(rank: int) -> None:
        run = Thawing(rank).step(2)
        with torch.no_grad():
            run.parameters[2].add_(rank)
        run.thaw().step()

    for failure in caught(2, fn):
        assert isinstance(failure, ConsensusError), repr(failure)
        assert "'noname.1.0'" in str(failure)


def test_what_cannot_be_taken_in() -> None:
    """A dtype that cannot train: refused when it is to, on all workers."""

    def fn(rank: int) -> None:
        parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2) + 0j, requires_grad=False)]
        optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1))
        for step in range(3):
            parameters[0].grad = torch.ones(3)
            parameters[1].requires_grad_((rank, step) == (1, 2))
            optimizer.step()

    raised = caught(2, fn)
    assert isinstance(raised[0], WorkerError)
    assert isinstance(raised[1], TypeError)
    assert "'noname.0.1' is of dtype torch.complex64" in str(raised[1])


@pytest.mark.parametrize("options", SETTINGS[:3], ids=str)
def test_freezing_what_trained(options: dict[str, Any]) -> None:
    """It stays in, and its update is 0: the errors are paid out, and x follows them alone."""

    def fn(rank: int) -> dict[str, bytes]:
        run = Thawing(rank, frozen=False, **options).step(4).thaw(False)
        names = list(run.optimizer.state_dict()["hvd_saef"].get("x", ()))
        run.step(4)
        assert names == list(run.optimizer.state_dict()["hvd_saef"].get("x", ()))
        run.optimizer.eval()
        return bits(run.parameters)

    first, *others = together(3, fn)
    assert all(other == first for other in others)


def test_a_gradient_without_requiring_one_takes_part() -> None:
    """The torch optimizer would step with it."""

    def fn(rank: int) -> Tensor:
        parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)]
        optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD(parameters, lr=1.0), **DENSE)
        for parameter in parameters:
            parameter.grad = torch.full((2,), 1.0 + rank)
        optimizer.step()
        return parameters[1].detach()

    for moved in together(2, fn):
        assert torch.equal(moved, torch.full((2,), -0.5))


@pytest.mark.parametrize("options", [{}, {"feedback": "none"}, DENSE, {"local_steps": 2}], ids=str)
def test_all_frozen_at_first(options: dict[str, Any]) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        parameter = nn.Parameter(torch.linspace(-1, 1, 6), requires_grad=False)
        optimizer = hvd_saef.DistributedOptimizer(torch.optim.SGD([parameter], lr=0.1), **options)
        optimizer.step()
        optimizer.eval()
        optimizer.train()
        optimizer.step()
        parameter.requires_grad_(True)
        before = parameter.detach().clone()
        for _ in range(2):
            parameter.grad = torch.linspace(0, 1, 6) + rank
            optimizer.step()
        optimizer.eval()
        assert bool((parameter < before).all())
        return bits(parameter)

    first, *others = together(3, fn)
    assert all(other == first for other in others)


# -- with what is saved, and the collective calls -----------------------------------------------------------

SAVED: list[dict[str, Any]] = [*SETTINGS, {"local_steps": 4, "averaging_period": 2}]


def resumed(run: Thawing, state: Any) -> Thawing:
    """A fresh run with the state of another: its parameters are elsewhere before."""
    run.optimizer.load_state_dict(state["optimizer"])
    with torch.no_grad():  # as hvd.broadcast_parameters or a model's state would
        for parameter, value in zip(run.parameters, state["parameters"], strict=True):
            parameter.copy_(value)
    run.taken = state["taken"]
    return run


def state_of(run: Thawing) -> Any:
    """What :func:`resumed` takes."""
    parameters = [parameter.detach().clone() for parameter in run.parameters]
    return saved({"optimizer": run.optimizer.state_dict(), "parameters": parameters, "taken": run.taken})


@pytest.mark.parametrize("options", SAVED, ids=str)
@pytest.mark.parametrize("when", ["before", "unfrozen, no step yet", "after"])
@pytest.mark.parametrize("workers", [1, 3])
def test_resumed_equals_uninterrupted(options: dict[str, Any], when: str, workers: int) -> None:
    """To the bit, whether or not the resumed optimizer was wrapped with all of them trainable."""

    def fn(rank: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
        run = Thawing(rank, **options).step(3)
        if when != "before":
            run.thaw()
        if when == "after":
            run.step(2)
        state = state_of(run)
        again = resumed(Thawing(rank, frozen=when == "before", seed=1, **options), state)
        outcomes = [bits([r.thaw().step(5).parameters, r.inner.state_dict()["state"]]) for r in (run, again)]
        return outcomes[0], outcomes[1]

    told = warned(workers, lambda rank: None if (pair := fn(rank))[0] == pair[1] else pytest.fail("differ"))
    assert [text for _, text in told if "cleared" in text] == []


@pytest.mark.parametrize("options", [{}, DENSE], ids=str)
def test_a_state_of_after_into_a_frozen_one(options: dict[str, Any]) -> None:
    def fn(rank: int) -> None:
        state = Thawing(rank, **options).step(2).thaw().step(2).optimizer.state_dict()
        fresh = Thawing(rank, **options)
        before = everything(fresh)
        if options is DENSE:  # nothing of ours in it: it fits
            fresh.optimizer.load_state_dict(state)
            return
        with pytest.raises(ValueError, match=r"'noname.1.0' was trained, and is frozen here"):
            fresh.optimizer.load_state_dict(state)
        assert everything(fresh) == before
        fresh.thaw().optimizer.load_state_dict(state)  # after wrapping, too

    together(3, fn)


def job(rank: int, frozen: bool) -> Job:
    """A model with a frozen first layer."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    model[0].requires_grad_(not frozen)
    return Job(rank, model, block_size=4)


def test_checkpoints(tmp_path: Path) -> None:
    def fn(rank: int) -> None:
        run = job(rank, frozen=True)
        start = run.seen()
        run.step(3)
        assert run.seen()["/0.weight"] == start["/0.weight"]
        hvd_saef.save_checkpoint(tmp_path / "before", run.model, run.optimizer)
        run.model.requires_grad_(True)
        run.step(3)
        hvd_saef.save_checkpoint(tmp_path / "after", run.model, run.optimizer)
        wanted = run.step(3).seen()

        again = job(rank, frozen=True)
        hvd_saef.load_checkpoint(tmp_path / "before", again.model, again.optimizer)
        again.model.requires_grad_(True)
        again.taken = 3
        assert again.step(6).seen() == wanted

        fresh = job(rank, frozen=True)
        with pytest.raises(CheckpointError, match=r"0\.bias.*checkpoint only; it is frozen here"):
            hvd_saef.load_checkpoint(tmp_path / "after", fresh.model, fresh.optimizer)
        fresh.model.requires_grad_(True)
        hvd_saef.load_checkpoint(tmp_path / "after", fresh.model, fresh.optimizer)
        fresh.taken = 6
        assert fresh.step(3).seen() == wanted

    together(3, fn)


@pytest.mark.parametrize("odd", [None, 1])
def test_overlap(odd: int | None) -> None:
    """The step that takes a layer in sends nothing early; and one worker that disagrees is found out."""

    def fn(rank: int, overlap: bool) -> dict[str, bytes]:
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        model[0].requires_grad_(False)
        run = Job(rank, model, overlap=overlap, bucket_bytes=1).step(3)
        if rank != odd:
            model.requires_grad_(True)
        return run.step(4).seen()

    if odd is None:
        assert together(3, lambda rank: fn(rank, True)) == together(3, lambda rank: fn(rank, False))
        return
    assert len(caught(3, lambda rank: fn(rank, True))) == 3


CALLS: dict[str, Callable[[Thawing], Any]] = {
    "consolidate": lambda run: run.optimizer.consolidate(),
    "reanchor": lambda run: run.optimizer.reanchor(),
    "flush": lambda run: run.optimizer.flush(),
    "eval": lambda run: (run.optimizer.eval(), run.optimizer.train()),
    "synchronize": lambda run: run.optimizer.synchronize(),
    "state_dict": lambda run: run.optimizer.state_dict(),
}


@pytest.mark.parametrize("options", SAVED, ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_between_unfreezing_and_the_next_step(
    call: Callable[[Thawing], Any], options: dict[str, Any]
) -> None:
    def fn(rank: int) -> dict[str, bytes]:
        run = Thawing(rank, check_consensus_every=1, **options).step(3).thaw()
        call(run)
        run.step(5)
        run.optimizer.flush()
        run.optimizer.eval()
        return bits(run.parameters)

    first, *others = together(3, fn)
    assert all(other == first for other in others)


@pytest.mark.parametrize("compression", [Compression.sign, Compression.none])
def test_consolidated_and_loaded_by_all(compression: Any) -> None:
    """Rank 0's state of after unfreezing goes to everyone, with nothing lost."""

    def fn(rank: int) -> dict[str, bytes]:
        run = Thawing(rank, compression=compression).step(3).thaw()
        run.optimizer.consolidate()
        state = run.optimizer.state_dict()
        assert state["hvd_saef"]["consolidated"]
        everyone = run.optimizer._saef.communicator.allgather_object(state_of(run))
        fresh = resumed(Thawing(rank, frozen=False, seed=3, compression=compression), everyone[0])
        return bits([fresh.step(3).x(), run.step(3).x()])

    told = warned(3, fn)
    assert [text for _, text in told if "cleared" in text] == []


@pytest.mark.parametrize(
    "options",
    [
        {"server": "replicated"},
        {"server": "sharded"},
        {"double_compression": False},
        {"feedback": "ef"},
        {"local_steps": 2},
        {"overlap": True},
    ],
    ids=str,
)
def test_what_is_frozen_while_training_goes_where_its_updates_were_to_take_it(
    options: dict[str, Any],
) -> None:
    """Without gradients: x moves to x̃, which stays, by what had not been sent; it does not stop halfway."""

    def fn(rank: int) -> tuple[float, float, float, float]:
        run = Thawing(rank, frozen=False, dtype=torch.float64, **options).step(6).thaw(False)

        def x_and_auxiliary() -> tuple[Tensor, Tensor]:
            with run.optimizer.consensus():
                x = torch.cat([parameter.detach().flatten() for parameter in run.parameters[2:]])
            with hvd_saef.diagnostics.auxiliary_point(run.optimizer):
                return x, torch.cat([parameter.detach().flatten() for parameter in run.parameters[2:]])

        x, auxiliary = x_and_auxiliary()
        run.step(2)
        moved = float((x_and_auxiliary()[0] - x).norm())
        run.step(300)
        now, stays = x_and_auxiliary()
        off = float((stays - auxiliary).norm() / auxiliary.norm())
        return moved, off, float((x - auxiliary).norm()), float((now - auxiliary).norm())

    for moved, off, before, after in together(2, fn):
        assert moved > 0
        assert off < 1e-13
        assert after < 0.05 * before
