"""The watch over waits: in the simulation, and the settings of how long to wait."""

from __future__ import annotations

import math
import threading
import time
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from hvd_saef import StalledExchangeError, WorkerError, run_workers
from hvd_saef.transport import find
from hvd_saef.transport.posts import Message, MpiPost
from hvd_saef.transport.watch import Patience, Stall, Watch
from tests.workers import DEADLINE, NO_MODEL, Run, everything, together

pytestmark = pytest.mark.filterwarnings(NO_MODEL)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_SAEF_STALL_WARNING_S", "1")
    monkeypatch.setenv("HVD_SAEF_STALL_ABORT_S", "2.5")


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("workers", [2, 4])
def test_a_thread_that_never_arrives(workers: int) -> None:
    """Those who wait name it and raise, and so does run_workers, though the thread never ends."""
    release, raised, all_here = threading.Event(), [], threading.Barrier(workers)

    def fn(rank: int) -> None:
        run = Run(rank).step(2)
        all_here.wait()
        if rank == workers - 1:
            release.wait(DEADLINE)
        try:
            run.step()
        except StalledExchangeError as error:
            raised.append((rank, str(error)))
            raise

    with (
        pytest.warns(RuntimeWarning, match=rf"rank 0 .* in combine, round 3: rank {workers - 1} did not"),
        pytest.raises(StalledExchangeError, match=rf"combine, round 3: rank {workers - 1} did not arrive"),
    ):
        run_workers(workers, fn)
    assert not release.is_set()
    assert sorted(rank for rank, _ in raised) == list(range(workers - 1))
    release.set()


def test_a_thread_that_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    all_here = threading.Barrier(3)

    def fn(rank: int, late: bool) -> dict[str, bytes]:
        run = Run(rank).step(2)
        all_here.wait()
        while rank == 1 and late and not seen:
            time.sleep(0.01)
        return everything(run.step(2))

    monkeypatch.setenv("HVD_SAEF_STALL_WARNING_S", "1")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", RuntimeWarning)
        paused = together(3, lambda rank: fn(rank, True))
    said = [str(warning.message) for warning in seen if warning.category is RuntimeWarning]
    assert "rank 1 did not arrive" in said[0]
    assert "goes on with combine, round 3 after" in said[-1]
    assert {text.split()[1] for text in said} <= {"0"}
    monkeypatch.setenv("HVD_SAEF_STALL_WARNING_S", str(DEADLINE))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert together(3, lambda rank: fn(rank, False)) == paused


def test_an_error_of_the_missing_worker_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is late with an exception is no stall: its own error is what is raised."""
    monkeypatch.setenv("HVD_SAEF_STALL_WARNING_S", "0.3")
    monkeypatch.setenv("HVD_SAEF_STALL_ABORT_S", str(DEADLINE))

    def closure() -> float:
        while not seen:
            time.sleep(0.01)
        raise ZeroDivisionError("late")

    def fn(rank: int) -> None:
        run = Run(rank).step(1)
        run.set_gradients()
        run.optimizer.step(closure if rank == 1 else lambda: 1.0)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", RuntimeWarning)
        with pytest.raises((ZeroDivisionError, WorkerError), match="late"):
            together(2, fn)


def test_seconds_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HVD_SAEF_STALL_WARNING_S", "HVD_SAEF_STALL_ABORT_S"):
        monkeypatch.delenv(name, raising=False)
    assert Patience.of_environment() == Patience(60.0, math.inf)
    monkeypatch.setenv("HVD_SAEF_STALL_WARNING_S", "0")
    monkeypatch.setenv("HVD_SAEF_STALL_ABORT_S", "600")
    assert Patience.of_environment() == Patience(math.inf, 600.0)
    for wrong in ("soon", "-1", "nan"):
        monkeypatch.setenv("HVD_SAEF_STALL_ABORT_S", wrong)
        with pytest.raises(ValueError, match=f"HVD_SAEF_STALL_ABORT_S='{wrong}'.*a number of seconds"):
            Patience.of_environment()


class LateMail:
    """MPI.COMM_WORLD with two messages, which a look lets in and the next one sees, as in most MPIs."""

    def __init__(self) -> None:
        self.messages = [Message(1, {}), Message(2, {})]
        self._looks = 0

    def improbe(self, tag: int) -> Any:  # noqa: D102
        self._looks += 1
        seen = self._looks > 1 and self.messages
        return SimpleNamespace(recv=self.messages.pop) if seen else None


def test_no_message_is_left_at_the_end() -> None:
    """MPICH would not end MPI with one."""
    mail = LateMail()
    Watch(MpiPost(mail), 0, 3, Patience(math.inf, math.inf)).hear_out()
    assert mail.messages == []


@pytest.mark.parametrize("ended", [False, True])
def test_a_rank_that_fails_aborts_only_while_there_is_mpi(ended: bool) -> None:
    codes: list[int] = []
    world = SimpleNamespace(Abort=codes.append)
    find._abort(SimpleNamespace(Is_finalized=lambda: ended, COMM_WORLD=world))
    assert codes == ([] if ended else [1])


def test_when_it_speaks() -> None:
    """After the time that is set, then after twice as long each time; never for another rank."""
    stall = Stall(Patience(1.0, math.inf), 0, "a gather")
    spoken = []
    for tenth in range(100):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            stall.look(tenth / 10, [2, 3], ["Rank 1 waits in a broadcast instead."])
        spoken += [(tenth / 10, str(warning.message)) for warning in seen]
    assert [when for when, _ in spoken] == [1.0, 2.0, 4.0, 8.0]
    assert "1.0 s in a gather: ranks 2, 3 did not arrive" in spoken[0][1]
    assert "Rank 1 waits in a broadcast instead." in spoken[0][1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Stall(Patience(1.0, math.inf), 1, "a gather").look(5.0, [2], speaks=False)
    with pytest.warns(RuntimeWarning, match="all ranks arrived, so the network"):
        Stall(Patience(1.0, math.inf), 1, "a gather").look(5.0, [])
