"""Messages between ranks that have not all come yet, through the torch.distributed store of the job.

The store is the one that the job started from, at MASTER_ADDR and MASTER_PORT; rank 0 serves it, or torchrun.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hvd_saef.transport.posts import Call, Message
from hvd_saef.transport.watch import start

SHORTEST, LONGEST = 1.0, 10.0
"""The bounds of the seconds after which a store counts as lost: no longer than the patience with ranks."""
CHANGES = "changes"
UNKNOWN = "MASTER_ADDR and MASTER_PORT are not set, so nobody knows who is there."


class StorePost:
    """Messages between ranks through the job's store. Each keeps one entry; a counter counts their changes.

    torch waits for a store's answer without a limit, so whoever asks a store whose process is stopped hangs.
    That is why a thread asks, and this rank goes on to look whether its own wait is over.
    """

    def __init__(self, prefix: str, rank: int, size: int, limit: float = math.inf) -> None:
        """Use the part of the store that begins with `prefix`, as number `rank` of `size`. Local.

        A store that does not answer for `limit` seconds is lost, until it answers.
        """
        self._prefix = prefix
        self._limit = max(SHORTEST, min(limit, LONGEST))
        self._own, self._others = rank, [other for other in range(size) if other != rank]
        self._entry = Entry()
        self._posted = ""
        self._heard: deque[Message] = deque()
        self._seen = 0
        self._store: Any = None
        self._failed = ""
        self._question: Future[None] | None = None
        self._asked = 0.0

    @property
    def lost(self) -> str:
        """Why messages cannot be read at present, as a sentence; "" as long as they can."""
        reason = self._failed
        if not reason and not self._is_idle() and time.monotonic() - self._asked > self._limit:
            reason = f"no answer for {self._limit:g} s"
        if not reason or reason == UNKNOWN:
            return reason
        return (
            "The store, by which ranks tell that they are there, does not answer: "
            f"{_server()}, which serves it, is stopped, cut off or has ended ({reason})."
        )

    def tell(self, message: Message, ranks: Sequence[int]) -> None:  # noqa: D102
        self._entry.take(message)
        self._ask()

    def hear(self) -> Iterable[Message]:  # noqa: D102
        self._ask()
        while self._heard:
            yield self._heard.popleft()

    def tidy(self) -> bool:  # noqa: D102
        return False  # an entry replaces the one before it

    def _is_idle(self) -> bool:
        return self._question is None or self._question.done()

    def _ask(self) -> None:
        """Begins an exchange with the store, unless one is under way."""
        if self._is_idle():
            self._asked = time.monotonic()
            self._question = start(self._exchange)

    def _exchange(self) -> None:
        """Writes this rank's entry and reads those of the others, where there is something new."""
        try:
            if self._store is None:
                self._store = client(_address(), LONGEST, self._prefix)
                self._posted = ""
            text = self._entry.text
            if text != self._posted:
                self._store.set(str(self._own), text)
                self._store.add(CHANGES, 1)
                self._posted = text
            changes = self._store.add(CHANGES, 0)
            if changes != self._seen:
                there = [rank for rank in self._others if self._store.check([str(rank)])]
                self._heard.extend([read(rank, self._store.get(str(rank))) for rank in there])
                self._seen = changes
            self._failed = ""
        except (KeyError, ValueError):
            self._failed = UNKNOWN
        except RuntimeError as error:
            self._store, self._failed = None, first_line(error)


class Entry:
    """What a rank has to tell others, as one text: where it waits on each channel, and whether it ends."""

    def __init__(self) -> None:
        self.text = ""
        self._waits: dict[str, Call] = {}

    def take(self, message: Message) -> None:
        """Adds a message of this rank."""
        self._waits.update(message.waits)
        waits = {channel: asdict(call) for channel, call in self._waits.items()}
        self.text = json.dumps({"waits": waits, "ended": message.ended})


def read(rank: int, text: bytes) -> Message:
    """Returns the message in a rank's entry. Local."""
    entry: Mapping[str, Any] = json.loads(text)
    waits = {channel: Call(**call) for channel, call in entry["waits"].items()}
    return Message(rank, waits, entry["ended"])


def _address() -> tuple[str, int]:
    """Returns where the job's store is. Raises KeyError or ValueError if the environment does not say it."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _server() -> str:
    """Returns in words who serves the job's store, and where."""
    torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = _address()
    return f"{'torchrun on' if torchrun else 'rank 0 at'} {host}:{port}"


def client(address: tuple[str, int], limit: float, prefix: str) -> Any:
    """Returns a part of the store at an address. Raises RuntimeError if none comes in `limit` seconds."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        *address, timeout=timedelta(seconds=limit), wait_for_workers=False
    )
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]


def first_line(error: Exception) -> str:
    """Returns what an error says, without the stack of C++ below it. Local."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
