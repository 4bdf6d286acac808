"""The end of the whole job when one rank fails, since the other ranks would wait for it for ever. Local."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType


def abort_on_exceptions(rank: int, end: Callable[[], object]) -> None:
    """Makes an exception that ends this process also call `end`, which ends all ranks of the job.

    `rank` is this rank's number in the job, for the message. Changes sys.excepthook. With HVD_SAEF_NO_ABORT=1
    nothing is changed, and the launcher must end the job.
    """
    if os.environ.get("HVD_SAEF_NO_ABORT") == "1":
        return
    earlier, pid = sys.excepthook, os.getpid()

    def abort(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        earlier(kind, error, traceback)
        if os.getpid() != pid:  # this process was forked from the rank
            return
        print(f"hvd_saef: rank {rank} failed and ends the job.", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        end()

    sys.excepthook = abort
