"""Stopping in good order when the cluster wants its nodes back: at a walltime limit, or when preempted."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn

from hvd_saef.round.session import Session

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
REQUEUE = os.EX_TEMPFAIL
"""75, "try again later": the exit code on which launch/slurm/requeue.sbatch queues the job again."""


class GracefulStop:
    """Turns a signal to any rank into the same step on all ranks, after which all save and leave.

    ::

        with hvd_saef.GracefulStop(optimizer) as stop:
            for batch in batches:
                ...
                optimizer.step()
                if stop.requested:
                    hvd_saef.save_checkpoint("checkpoint", model, optimizer, batch=...)
                    stop.exit()

    A signal is only noted, also in the middle of an MPI call, with overlap=True or between local steps. The
    rank says so with the word that all exchange in their next step(): no collective is added, and after
    that step, which all complete, `requested` is True on all of them. A save between local steps
    (local_steps > 1) keeps the point reached, and goes on to the bit. Further signals change nothing, so
    SIGUSR1 before the limit and SIGTERM at it may both come; SIGKILL and Ctrl-C are as always. From the
    signal to the end it takes a step, what runs between two steps (an evaluation, say) and the save: let
    the scheduler signal that much earlier. After the last step nobody is told, and training ends as always.

    With several optimizers pass all of them: the next step() of any decides, for all ranks alike, so look at
    `requested` where all ranks have taken the same steps. It is the ranks of the optimizers' process sets
    that agree; sets with no optimizer in common must each be signalled.

    Entering replaces the Python handlers of these signals, leaving puts them back. A signal before that has
    its usual effect, which ends the process. Processes forked inside (a DataLoader's workers) end on SIGTERM
    as always, and ignore the others: schedulers may signal every process of a job, so prefer SIGUSR1.

    Args:
        optimizers: what hvd_saef.DistributedOptimizer returned, one or several.
        signals: those to note. With () there are none, and :meth:`request` alone asks.
        exit_code: 0 to 255, what :meth:`exit` leaves with.

    Raises:
        TypeError: something else than these optimizers.
        ValueError: no optimizer, an exit code out of range, or a signal that cannot be handled.
        RuntimeError: on entering outside the main thread, where Python takes no signals.

    """

    def __init__(
        self,
        *optimizers: Any,
        signals: Sequence[signal.Signals] = SIGNALS,
        exit_code: int = REQUEUE,
    ) -> None:
        if not optimizers:
            raise ValueError("GracefulStop(): pass the optimizer whose steps the ranks agree in.")
        self._sessions: list[Session] = []
        for optimizer in optimizers:
            session = getattr(optimizer, "_saef", None)
            if not isinstance(session, Session):
                raise TypeError(
                    f"optimizers: {type(optimizer).__name__} was given; what hvd_saef.DistributedOptimizer "
                    "returned is allowed."
                )
            self._sessions.append(session)
        if not 0 <= exit_code <= 255:
            raise ValueError(f"exit_code={exit_code!r}: 0 to 255 is allowed.")
        for number in signals:
            if number in (signal.SIGKILL, signal.SIGSTOP):
                raise ValueError(f"signals: {number!r} cannot be handled; SIGUSR1 and SIGTERM can, say.")
        self.exit_code = exit_code
        self._signals = tuple(signals)
        self._earlier: dict[int, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> GracefulStop:
        if self._signals and threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "GracefulStop takes signals in the main thread only: enter it there, or pass signals=() and "
                "call request()."
            )
        for session in self._sessions:
            session.wants_to_stop = session.stop_agreed = False
        self._owner = os.getpid()
        for number in self._signals:
            self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._owner:
            self.request()
        elif number == signal.SIGTERM:  # a fork that its parent wants to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def request(self) -> None:
        """Ask all ranks to stop, as a signal does: for a reason of your own. Local; one rank is enough."""
        for session in self._sessions:
            session.wants_to_stop = True

    @property
    def requested(self) -> bool:
        """Whether the ranks have agreed to stop: the same on all of them after the same step."""
        return any(session.stop_agreed for session in self._sessions)

    def exit(self) -> NoReturn:
        """Wait for all ranks, end Horovod and MPI, and raise SystemExit(exit_code). Collective.

        Raises RuntimeError before the ranks have agreed: the others would not come.
        """
        if not self.requested:
            raise RuntimeError("exit() before the ranks agreed to stop: call it where `requested` is True.")
        for session in self._sessions:
            session.communicator.finish()
        sys.stdout.flush()
        sys.exit(self.exit_code)
