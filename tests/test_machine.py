"""Programs of everything that users do, by all ranks together, against a model in plain numpy.

`make machine` runs others for an hour. What fails is printed as Python, to be put in here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from hvd_saef.round.modes import Modes
from hvd_saef.transport.communicator import Channel
from hvd_saef.transport.threads import ThreadCommunicator
from tests.conftest import on_one_core
from tests.machine.actions import Action, Backward, Forward, Look, Step, Zero
from tests.machine.options import Options
from tests.machine.programs import programs
from tests.machine.running import Program, check

FIXED = settings(
    max_examples=int(os.environ.get("HVD_SAEF_MACHINE_PROGRAMS", "250")),
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module", autouse=True)
def one_of_the_cores() -> Iterator[None]:
    """Threads that wait for each other hand over nearly twice as fast on one."""
    with on_one_core():
        yield


TRAINS: tuple[Action, ...] = (Zero(), Forward(), Backward(), Step())


@FIXED
@given(program=programs())
def test_programs_do_as_the_model(program: Program) -> None:
    check(program)


LOOKS = Program(Options(local_steps=2), (*TRAINS, Look(), *TRAINS))


def test_a_look_that_forgets_the_point_reached_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counter-check: with that fault, the same program fails, and says how to run it."""
    check(LOOKS)
    monkeypatch.setattr(Modes, "training_point", lambda modes: None)
    with pytest.raises(AssertionError, match=r"(?s)off, in mode.*Program\("):
        check(LOOKS)


def test_payloads_that_are_mixed_up_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counter-check: the first worker's payload in place of the second's."""
    allgather = ThreadCommunicator.allgather

    def mixed_up(self: Any, payload: Any, out: Any, channel: Channel) -> None:
        allgather(self, payload, out, channel)
        out[1].copy_(out[0])

    program = Program(Options(double=False), TRAINS)
    check(program)
    monkeypatch.setattr(ThreadCommunicator, "allgather", mixed_up)
    with pytest.raises(AssertionError, match="off"):
        check(program)


def test_workers_that_do_not_agree_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counter-check: one worker's x has another last bit."""
    allreduce_mean = ThreadCommunicator.allreduce_mean

    def rounded(self: Any, tensor: Any, name: str) -> None:
        allreduce_mean(self, tensor, name)
        if self.rank == 1:
            tensor.mul_(1 + 2**-50)

    program = Program(Options(compressor="none", double=False), TRAINS)
    check(program)
    monkeypatch.setattr(ThreadCommunicator, "allreduce_mean", rounded)
    with pytest.raises(AssertionError, match="has other bits on other ranks"):
        check(program)
