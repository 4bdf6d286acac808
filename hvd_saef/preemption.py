"""Stops all ranks in good order when the cluster wants its nodes back: at a time limit or a preemption."""

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
"""The exit code 75, "try again later", on which launch/slurm/requeue.sbatch queues the job again."""


class GracefulStop:
    """Turns a signal to any rank into a stop of all ranks after the same step, so that all save and leave.

    ::

        with hvd_saef.GracefulStop(optimizer) as stop:
            for batch in batches:
                ...
                optimizer.step()
                if stop.requested:
                    hvd_saef.save_checkpoint("checkpoint", model, optimizer, batch=...)
                    stop.exit()

    The signal's handler only notes the signal, also in the middle of an MPI call, with overlap=True or
    between local steps. The rank passes the note on in the word that all ranks exchange in their next step():
    no collective is added, and after that step, which all ranks complete, `requested` is True on all of them.
    A checkpoint between local steps (local_steps > 1) keeps the point reached, and resumes to the bit.

    Further signals change nothing, so SIGUSR1 before the limit and SIGTERM at the limit may both come.
    SIGKILL and Ctrl-C have their usual effect. The scheduler must signal early enough for one step, whatever
    runs between two steps (an evaluation, say) and the save. A signal after the last step reaches no other
    rank, and training ends as always.

    With several optimizers pass all of them: the next step() of any optimizer decides, for all ranks alike,
    so look at `requested` where all ranks have taken the same steps. The ranks of the optimizers' process
    sets agree; if sets have no optimizer in common, each set must be signalled.

    Entering the context replaces the Python handlers of these signals, and leaving restores them. A signal
    before that has its usual effect, which ends the process. Processes forked inside (a DataLoader's workers)
    end on SIGTERM as always and ignore the other signals: schedulers may signal every process of a job, so
    prefer SIGUSR1.

    Args:
        optimizers: one or several optimizers that hvd_saef.DistributedOptimizer returned.
        signals: the signals to note. With () there are none, and only :meth:`request` asks to stop.
        exit_code: the process's exit code after :meth:`exit`, 0 to 255.

    Raises:
        TypeError: an argument is not such an optimizer.
        ValueError: no optimizer, an exit code out of range, or a signal that cannot be handled.
        RuntimeError: the context is entered outside the main thread, where Python takes no signals.

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
            session.stopping.forget()
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
        elif number == signal.SIGTERM:  # this is a forked process, which its parent wants to end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def request(self) -> None:
        """Asks all ranks to stop, as a signal does, for a reason of your own. Local; one rank is enough."""
        for session in self._sessions:
            session.stopping.ask()

    @property
    def requested(self) -> bool:
        """True if the ranks have agreed to stop. All ranks see the same value after the same step."""
        return any(session.stopping.agreed for session in self._sessions)

    def exit(self) -> NoReturn:
        """Waits for all ranks, ends Horovod and MPI, and raises SystemExit(exit_code). Collective.

        Raises RuntimeError if the ranks have not agreed to stop: the other ranks would not come.
        """
        if not self.requested:
            raise RuntimeError("exit() before the ranks agreed to stop: call it where `requested` is True.")
        for session in self._sessions:
            session.communicator.finish()
        sys.stdout.flush()
        sys.exit(self.exit_code)
