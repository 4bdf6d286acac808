"""The end of MPI in this process: it waits for what is under way, and the other ranks hear of it. Local.

Where hvd.init() started MPI, Horovod's thread ends it on all ranks as soon as one of them shuts Horovod down
or exits: also on a rank with other threads within a collective, which would crash there. Before it ends, MPI
deletes what is attached to MPI.COMM_SELF and calls whoever attached it: that is where the end is put off.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from hvd_saef.errors import StalledExchangeError

LONGEST = 300.0
"""Seconds that the end is put off at most: who shuts Horovod down within a step waits for itself."""
SHUT_DOWN = "Horovod was shut down: step() comes before hvd.shutdown()."


class Ending:
    """Puts off the end of MPI while some thread is within :meth:`put_off`, and then lets others know."""

    def __init__(self, mpi: Any) -> None:
        """`mpi` is mpi4py's MPI, which has begun."""
        self._mpi = mpi
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._users = 0
        self._over = False
        self._goodbyes: list[Callable[[], None]] = []
        key = mpi.Comm.Create_keyval(delete_fn=self._before_mpi_ends)
        mpi.COMM_SELF.Set_attr(key, self)
        # Where mpi4py started MPI, it ends MPI when there is no Python any more to be called.
        atexit.register(self._before_python_ends)

    @contextlib.contextmanager
    def put_off(self) -> Iterator[None]:
        """Within it MPI does not end, nor after a StalledExchangeError: what comes next may be MPI's abort.

        Raises RuntimeError if MPI has ended, or is about to.
        """
        with self._changed:
            if self._over:
                raise RuntimeError(SHUT_DOWN)
            self._users += 1
        done = 1
        try:
            yield
        except StalledExchangeError:
            done = 0  # while one thread ends MPI, another's abort may hang
            raise
        finally:
            with self._changed:
                self._users -= done
                self._changed.notify_all()

    def then(self, goodbye: Callable[[], None]) -> None:
        """Call `goodbye` when nothing is under way any more; not in a process forked from this one."""
        self._goodbyes.append(goodbye)

    def _before_mpi_ends(self, *_: Any) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0, LONGEST)
            self._over = True
        self._say_goodbye()

    def _before_python_ends(self) -> None:
        if os.getpid() == self._pid and not self._mpi.Is_finalized():
            self._say_goodbye()
            with self._changed:
                self._users = 0  # nothing is under way any more
                self._changed.notify_all()

    def _say_goodbye(self) -> None:
        goodbyes, self._goodbyes = self._goodbyes, []
        for goodbye in goodbyes:
            with contextlib.suppress(Exception):  # it is only a kindness
                goodbye()
