"""The end of MPI waits for what is under way, and others hear of it: with a stand-in for mpi4py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from hvd_saef.errors import StalledExchangeError
from hvd_saef.transport import ending
from hvd_saef.transport.ending import Ending

SHORT, LONG = 0.2, 60.0
"""Seconds in which nothing must happen, and in which it must."""


class FakeMpi:
    """What is used of mpi4py's MPI; `end` is what another thread's MPI_Finalize does first."""

    def __init__(self) -> None:
        self.finalized = False
        self.callback: Callable[..., None]
        self.Comm = SimpleNamespace(Create_keyval=self._create)
        self.COMM_SELF = SimpleNamespace(Set_attr=lambda key, value: None)

    def _create(self, delete_fn: Callable[..., None]) -> int:
        self.callback = delete_fn
        return 0

    def Is_finalized(self) -> bool:  # noqa: D102
        return self.finalized

    def end(self) -> threading.Thread:
        """Begin to end in another thread."""
        thread = threading.Thread(target=self.callback, args=(None, 0, None), daemon=True)
        thread.start()
        return thread


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeMpi, Ending, Callable[[], None]]:
    """MPI, the ending, and what Python's end calls."""
    at_exit: list[Any] = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    mpi = FakeMpi()
    found = Ending(mpi)
    return mpi, found, at_exit[0]


def ends(thread: threading.Thread) -> bool:
    thread.join(LONG)
    return not thread.is_alive()


def waits(thread: threading.Thread) -> bool:
    thread.join(SHORT)
    return thread.is_alive()


Made = tuple[FakeMpi, Ending, Callable[[], None]]


def test_the_end_waits_for_all_that_is_under_way(made: Made) -> None:
    mpi, found, _ = made
    said: list[int] = []
    found.then(lambda: said.append(1))
    with found.put_off():
        with found.put_off():
            end = mpi.end()
            assert waits(end)
        assert waits(end)
        assert said == []
    assert ends(end)
    assert said == [1]
    with pytest.raises(RuntimeError, match="Horovod was shut down"), found.put_off():
        pass


def test_another_error_does_not_keep_mpi(made: Made) -> None:
    mpi, found, _ = made
    with pytest.raises(ValueError, match="no"), found.put_off():
        raise ValueError("no")
    assert ends(mpi.end())


def test_a_rank_that_gave_up_waiting_can_abort(made: Made) -> None:
    mpi, found, python_ends = made
    with pytest.raises(StalledExchangeError), found.put_off():
        raise StalledExchangeError("rank 1 ended")
    end = mpi.end()
    assert waits(end)
    python_ends()  # it did not abort
    assert ends(end)


def test_python_may_end_first_or_alone(made: Made) -> None:
    mpi, found, python_ends = made
    said: list[int] = []
    found.then(lambda: said.append(1))
    python_ends()
    assert said == [1]
    assert ends(mpi.end())
    assert said == [1]


def test_nothing_is_said_once_mpi_has_ended_or_in_another_process(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    mpi, found, python_ends = made
    said: list[int] = []
    found.then(lambda: said.append(1))
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: -1)
        python_ends()
    mpi.finalized = True
    python_ends()
    assert said == []


def test_it_is_not_put_off_for_ever(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "LONGEST", SHORT)
    mpi, found, _ = made
    with found.put_off():
        assert ends(mpi.end())


def test_mpi_does_not_end_under_a_goodbye_at_pythons_end(made: Made) -> None:
    """Horovod's thread ends MPI on this rank as soon as another rank has ended."""
    mpi, found, python_ends = made
    begun, go_on, said = threading.Event(), threading.Event(), []

    def goodbye() -> None:
        begun.set()
        assert go_on.wait(LONG)
        said.append("goodbye")

    found.then(goodbye)
    leaving = threading.Thread(target=python_ends, daemon=True)
    leaving.start()
    assert begun.wait(LONG)
    thread = mpi.end()
    assert waits(thread)
    go_on.set()
    assert ends(thread)
    assert ends(leaving)
    assert said == ["goodbye"]
