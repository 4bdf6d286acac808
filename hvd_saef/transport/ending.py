"""The end of MPI in this process: it waits for collectives under way, and the other ranks are told. Local.

If hvd.init() started MPI, Horovod's thread ends MPI on all ranks as soon as one rank shuts Horovod down or
exits, also on a rank whose other threads are within a collective, and these would crash. Before MPI ends, it
deletes the attributes of MPI.COMM_SELF and calls their delete functions. Such a function puts the end off.
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
"""The longest time that the end is put off, in seconds: a hvd.shutdown() within a step waits for itself."""
SHUT_DOWN = (
    "Horovod was shut down, by this rank or because another rank has ended: step() comes before "
    "hvd.shutdown(), and every rank must take the same number of steps: see hvd_saef.common_steps."
)


class Ending:
    """Puts off the end of MPI while any thread is within :meth:`put_off`, and then tells the other ranks."""

    def __init__(self, mpi: Any) -> None:
        """Attach to `mpi`, which is mpi4py's module MPI after MPI has started."""
        self._mpi = mpi
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._users = 0
        self._over = False
        self._goodbyes: list[Callable[[], None]] = []
        key = mpi.Comm.Create_keyval(delete_fn=self._before_mpi_ends)
        mpi.COMM_SELF.Set_attr(key, self)
        # If mpi4py started MPI, mpi4py ends MPI so late that Python functions can no longer be called.
        atexit.register(self._before_python_ends)

    @contextlib.contextmanager
    def put_off(self) -> Iterator[None]:
        """Returns a context within which MPI does not end.

        After a StalledExchangeError in the context the end stays put off, since MPI's abort may come next.
        Raises RuntimeError if MPI has ended or is about to end.
        """
        with self._changed:
            if self._over:
                raise RuntimeError(SHUT_DOWN)
            self._users += 1
        done = 1
        try:
            yield
        except StalledExchangeError:
            done = 0  # an abort may hang while another thread ends MPI
            raise
        finally:
            with self._changed:
                self._users -= done
                self._changed.notify_all()

    def then(self, goodbye: Callable[[], None]) -> None:
        """Registers `goodbye`, to be called when no collective is under way and MPI is about to end.

        A process forked from this one does not call `goodbye`.
        """
        self._goodbyes.append(goodbye)

    def _before_mpi_ends(self, *_: Any) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0, LONGEST)
            self._over = True
        self._say_goodbye()

    def _before_python_ends(self) -> None:
        if os.getpid() != self._pid or self._mpi.Is_finalized():
            return
        with self._changed:
            if self._over:  # Horovod's thread ends MPI, and says goodbye
                return
            self._users += 1  # Horovod's thread must not end MPI under a goodbye
        self._say_goodbye()
        with self._changed:
            self._users = 0  # no collective is under way when Python ends
            self._changed.notify_all()

    def _say_goodbye(self) -> None:
        goodbyes, self._goodbyes = self._goodbyes, []
        for goodbye in goodbyes:
            with contextlib.suppress(Exception):  # a goodbye only helps others: its failure changes nothing
                goodbye()
