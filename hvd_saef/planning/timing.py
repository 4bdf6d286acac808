"""Times calls on all ranks at once, in turns whose number all ranks agree on. Collective."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from hvd_saef.transport.communicator import Communicator
from hvd_saef.transport.together import together

FEWEST, MOST = 3, 50
"""The turns of one call."""


class Progress:
    """A progress bar on the rank that `speaks`: tqdm's where it is installed, else a line a stage. Local."""

    def __init__(self, total: int, speaks: bool) -> None:
        self._total, self._begun, self._speaks = total, 0, speaks
        self._bar: Any = None

    def begin(self, stage: str) -> None:
        """Says which stage begins."""
        if self._speaks and not self._begun:
            self._bar = _bar(self._total)
        if self._bar is not None:
            self._bar.update(self._begun - self._bar.n)
            self._bar.set_description_str(stage)
        elif self._speaks:
            print(f"{self._begun + 1}/{self._total}: {stage}", file=sys.stderr, flush=True)
        self._begun += 1

    def end(self, done: bool) -> None:
        """Ends the bar, at its end if all is `done`, else where it is."""
        if self._bar is not None:
            self._bar.update(self._total - self._bar.n if done else 0)
            self._bar.close()


def _bar(total: int) -> Any:
    """Returns tqdm's bar, or None without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    form = "{desc:<40}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
    return tqdm(total=total, bar_format=form, ncols=100, file=sys.stderr)


class Clock:
    """Times calls on all ranks of a communicator. Its methods are collective; they return the same on all."""

    def __init__(self, communicator: Communicator, device: torch.device, seconds: float) -> None:
        """Give about so many `seconds` to the turns of each call."""
        self.communicator, self.device, self.seconds = communicator, device, seconds

    def once(self, call: Callable[[], object], calls: int = 1) -> float:
        """Returns the seconds of one call after a first one, as the longest over ranks, of one turn.

        If a call raises an exception of its own on a rank, that rank raises it and the others WorkerError.
        """
        for _ in range(2):
            taken = together(self.communicator, lambda: self._turn(call, calls))
        return max(taken)

    def time(self, call: Callable[[], object], calls: int = 1) -> float:
        """Returns the seconds of one call as the median over turns of `calls` each, the longest over ranks.

        Raises as :meth:`once` does.
        """
        first = self.once(call, calls)
        turns = MOST if first == 0 else min(MOST, max(FEWEST, int(self.seconds / (calls * first))))
        taken = []
        for _ in range(turns):
            self.communicator.combine(0)  # all begin together
            taken.append(self._turn(call, calls))
        everyone: list[float] = self.communicator.allgather_object(statistics.median(taken))
        return max(everyone)

    def _turn(self, call: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / calls
