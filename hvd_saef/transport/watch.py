"""The watch over every wait for other ranks: which ranks are missing, in which call, and when to give up.

A wait of less than half a second sends nothing, and no wait keeps a thread. A rank that waits longer sends
each other rank a small message, which says which call on which channel it has reached; a rank that ends
sends a message, too. So waiting ranks know of each other, and a rank that has sent no message has not
arrived: it is stopped, busy with something else, or cannot be reached.
"""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from hvd_saef.errors import StalledExchangeError
from hvd_saef.transport.posts import Call, Message, Post

T = TypeVar("T")
CALM = 0.5
"""The seconds that a wait may last before the rank warns or sends messages."""
LOOK = 0.1
"""The seconds between two looks for messages, in longer waits."""
PAUSE, PAUSE_STEP = 100e-6, 2e-6
"""The longest pause between two checks whether a wait is over, and its growth each time, in seconds."""
LONG_PAUSE = 1e-3
"""The pause between two checks in longer waits, in seconds: ranks that compute get the core."""
LAST_LOOKS = 3
"""The looks for messages before the end: in most MPIs, one look lets them in, and the next one sees them."""


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise ValueError(f"{name}={text!r}: a number of seconds is allowed, or 0 for never.")
    return value or math.inf


@dataclass(frozen=True)
class Patience:
    """The seconds to wait before a warning, and before giving up; infinity means never."""

    warning: float
    abort: float

    @classmethod
    def of_environment(cls) -> Patience:
        """Reads HVD_SAEF_STALL_WARNING_S (default 60) and HVD_SAEF_STALL_ABORT_S (default 0); 0 is never.

        Raises ValueError for anything but a number of seconds.
        """
        return cls(_seconds("HVD_SAEF_STALL_WARNING_S", 60.0), _seconds("HVD_SAEF_STALL_ABORT_S", math.inf))

    @property
    def calm(self) -> float:
        """The seconds that a wait may last before the rank warns or sends messages."""
        return min(CALM, self.warning / 2, self.abort / 2)


class Stall:
    """One long wait: it warns after a time, again after twice as long, and at last may give up and raise."""

    def __init__(self, patience: Patience, rank: int, what: str) -> None:
        self._patience, self._rank, self._what = patience, rank, what
        self._next = patience.warning
        self._spoke = False

    def look(
        self, waited: float, missing: Sequence[int] | None, others: Sequence[str] = (), speaks: bool = True
    ) -> None:
        """Warns or raises if it is time, after `waited` seconds in which the ranks `missing` did not arrive.

        `missing` is None if that is not known. `others` are sentences about ranks that wait in another call.
        Raises StalledExchangeError after `patience.abort` seconds. Warns only on the rank that `speaks`.
        Local.
        """
        if waited >= self._patience.abort:
            raise StalledExchangeError(
                f"{self._describe(waited, missing, others)} HVD_SAEF_STALL_ABORT_S={self._patience.abort:g} "
                "ends the job now."
            )
        if waited >= self._next:
            self._next = 2 * waited
            self._spoke = self._spoke or speaks
            if speaks:
                hint = "" if self._patience.abort < math.inf else " HVD_SAEF_STALL_ABORT_S ends such jobs."
                warnings.warn(self._describe(waited, missing, others) + hint, RuntimeWarning, stacklevel=4)

    def over(self, waited: float) -> None:
        """Warns that the rank goes on after all, if this stall has warned before."""
        if self._spoke:
            warnings.warn(
                f"rank {self._rank} goes on with {self._what} after {waited:.0f} s.",
                RuntimeWarning,
                stacklevel=4,
            )

    def ended(self, ranks: Sequence[int]) -> StalledExchangeError:
        """Returns the error for `ranks` that have ended and will never arrive."""
        return StalledExchangeError(
            f"{_ranks(ranks)} ended before {self._what}, for which rank {self._rank} waits. Every rank must "
            "take the same number of steps: see hvd_saef.common_steps."
        )

    def cut_off(self, silent: Sequence[int] | None, why: Sequence[str]) -> StalledExchangeError:
        """Returns the error for a lost connection, when the ranks `silent` do not wait. None: unknown."""
        who = f": {_ranks(silent)} ended, failed or cannot be reached" if silent else ""
        text = f"rank {self._rank} lost a connection in {self._what}{who}."
        return StalledExchangeError(" ".join([text, *why]))

    def _describe(self, waited: float, missing: Sequence[int] | None, others: Sequence[str]) -> str:
        if missing is None:
            why = "which ranks did not arrive is not known."
        elif missing:
            why = f"{_ranks(missing)} did not arrive: stopped, busy with something else, or cut off."
        else:
            why = "all ranks arrived, so the network is slow or cut."
        return " ".join([f"rank {self._rank} has waited {waited:.1f} s in {self._what}: {why}", *others])


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


@dataclass
class Roll:
    """The knowledge of one waiting rank about the others."""

    arrived: set[int]
    others: list[str] = field(default_factory=list)
    """Sentences about ranks whose call of the same number is a different one."""
    ended: list[int] = field(default_factory=list)
    """The ranks that ended before this call."""


class Watch:
    """The waits of one rank for the other ranks of a communicator, which tell each other by a post.

    Threads may wait at the same time, each on a different channel. Local: no method is collective.
    """

    def __init__(
        self, post: Post, rank: int, size: int, patience: Patience, names: Sequence[int] | None = None
    ) -> None:
        """Keep `names`, the ranks' numbers for messages; without them 0 to `size` - 1 are used."""
        self._post = post
        self.rank, self.size = rank, size
        self._names = range(size) if names is None else names
        self._patience = patience
        self._lock = threading.Lock()
        self._calls: dict[str, Call] = {}
        self._heard: dict[int, dict[str, Call]] = {}
        self._ended: dict[int, Mapping[str, int]] = {}
        self._broken: StalledExchangeError | None = None

    def wait(
        self, done: Callable[[], bool], channel: str, what: str, ranks: Sequence[int] | None = None
    ) -> None:
        """Waits until `done()` returns True. The pauses between checks grow, so that others get the core.

        All `ranks` (None: all of the communicator) wait on a channel in the same order. Raises
        StalledExchangeError, in this call and in all later ones, if one of them has ended or the patience is
        over.
        """
        if self._broken is not None:
            raise self._broken
        call = Call(self._calls[channel].number + 1 if channel in self._calls else 1, what)
        self._calls[channel] = call
        pause, start = 0.0, time.monotonic()
        while not done():
            time.sleep(pause)
            pause = min(pause + PAUSE_STEP, PAUSE)
            if time.monotonic() - start > self._patience.calm:
                self._wait_long(done, channel, start, range(self.size) if ranks is None else ranks)
                return

    def tidy(self) -> None:
        """Receives waiting messages. Call this now and then: a rank that always arrives last never waits."""
        if self._post.tidy():
            self._listen()

    def hear_out(self) -> None:
        """Receives all messages that are there. MPICH does not end with unread ones in MPI.COMM_WORLD."""
        for _ in range(LAST_LOOKS):
            self._listen()

    def say_goodbye(self) -> None:
        """Tells the other ranks that this rank ends."""
        numbers = {channel: call.number for channel, call in self._calls.items()}
        self._tell(Message(self.rank, {}, numbers), range(self.size))

    def cut_off(self, channel: str, why: Exception) -> StalledExchangeError:
        """Returns the error for a call in which this rank lost the connection to another rank, as `why` says.

        Waits a moment for messages, so that the error can say which ranks are still there.
        """
        call, everyone = self._calls[channel], range(self.size)
        self._tell(Message(self.rank, {channel: call}), everyone)
        start = time.monotonic()
        while True:
            self._listen()
            roll = self._roll(channel, call)
            silent = self._missing(everyone, roll)
            if roll.ended or not silent or time.monotonic() - start > self._patience.calm:
                break
            time.sleep(LOOK)
        stall = Stall(self._patience, self._names[self.rank], call.what)
        if roll.ended:
            self._broken = stall.ended([self._names[rank] for rank in roll.ended])
        else:
            self._broken = stall.cut_off(silent, [str(why).rstrip(".") + ".", *self._sorry()])
        return self._broken

    def _wait_long(self, done: Callable[[], bool], channel: str, start: float, ranks: Sequence[int]) -> None:
        call = self._calls[channel]
        stall = Stall(self._patience, self._names[self.rank], call.what)
        self._tell(Message(self.rank, {channel: call}), ranks)
        look = 0.0
        while not done():
            time.sleep(LONG_PAUSE)
            waited = time.monotonic() - start
            if waited < look:
                continue
            look = waited + min(LOOK, self._patience.calm)
            self._listen()
            try:
                roll = self._roll(channel, call)
                if roll.ended:
                    raise stall.ended([self._names[rank] for rank in roll.ended])
                missing = self._missing(ranks, roll)
                others = [*roll.others, *self._sorry()]
                stall.look(waited, missing, others, speaks=self.rank == min(roll.arrived))
            except StalledExchangeError as error:
                self._broken = error
                raise
        stall.over(time.monotonic() - start)

    def _missing(self, ranks: Sequence[int], roll: Roll) -> list[int] | None:
        """Returns the names of the `ranks` that have not arrived; None if nothing is known of any rank."""
        if self._post.lost and roll.arrived == {self.rank}:
            return None
        return [self._names[rank] for rank in ranks if rank not in roll.arrived]

    def _sorry(self) -> list[str]:
        return [self._post.lost] if self._post.lost else []

    def _roll(self, channel: str, call: Call) -> Roll:
        roll = Roll({self.rank})
        with self._lock:
            for rank, calls in sorted(self._heard.items()):
                theirs = calls.get(channel)
                if theirs is not None and theirs.number >= call.number:
                    roll.arrived.add(rank)
                    if theirs.number == call.number and theirs.what != call.what:
                        roll.others.append(f"Rank {self._names[rank]} waits in {theirs.what} instead.")
            for rank, numbers in sorted(self._ended.items()):
                if numbers.get(channel, 0) < call.number:
                    roll.ended.append(rank)
        return roll

    def _tell(self, message: Message, ranks: Sequence[int]) -> None:
        with self._lock:
            self._post.tell(message, [rank for rank in ranks if rank != self.rank])

    def _listen(self) -> None:
        with self._lock:
            for message in self._post.hear():
                self._heard.setdefault(message.rank, {}).update(message.waits)
                if message.ended is not None:
                    self._ended[message.rank] = message.ended


def start(do: Callable[[], T]) -> Future[T]:
    """Calls `do` in a daemon thread, for which the process does not wait at its end; returns its future."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(do())
        except BaseException as failure:
            future.set_exception(failure)

    threading.Thread(target=work, daemon=True, name="hvd_saef setup").start()
    return future
