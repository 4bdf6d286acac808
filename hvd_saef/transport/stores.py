"""Messages between waiting ranks through a torch.distributed store, which no rank has to answer for.

The store is the one that the job started from, at MASTER_ADDR and MASTER_PORT. Each rank keeps one entry, and
a counter says when any entry has changed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hvd_saef.transport.posts import Call, Message

PATIENCE = timedelta(seconds=10)
"""The longest time that a rank waits for the store's answer."""
CHANGES = "changes"

_made: Counter[str] = Counter()


class StorePost:
    """Messages between `size` ranks, of which this one has the number `rank`. Making it is collective."""

    def __init__(self, name: str, rank: int, size: int) -> None:
        """Use the part of the store that belongs to `name`, which other groups of ranks do not have."""
        self.lost = ""
        _made[name] += 1  # after destroy_process_group() the same ranks may meet again
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store: Any = None
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, timeout=PATIENCE, wait_for_workers=False
            )
            self._store = dist.PrefixStore(  # type: ignore[attr-defined]
                f"hvd_saef/{attempt}/{name}/{_made[name]}", store
            )
        except (KeyError, ValueError):
            self.lost = "MASTER_ADDR and MASTER_PORT are not set, so nobody knows who is there."
        except RuntimeError as error:
            self._lose(error)
        self._own, self._others = rank, [other for other in range(size) if other != rank]
        self._waits: dict[str, Call] = {}
        self._seen = 0

    def tell(self, message: Message, ranks: Sequence[int]) -> None:  # noqa: D102
        if self._store is None:
            return
        self._waits.update(message.waits)
        waits = {channel: asdict(call) for channel, call in self._waits.items()}
        try:
            self._store.set(str(self._own), json.dumps({"waits": waits, "ended": message.ended}))
            self._store.add(CHANGES, 1)
        except RuntimeError as error:
            self._lose(error)

    def hear(self) -> Iterable[Message]:  # noqa: D102
        if self.lost:
            return []
        try:
            changes = self._store.add(CHANGES, 0)
            if changes == self._seen:
                return []
            heard = [self._read(rank) for rank in self._others if self._store.check([str(rank)])]
        except RuntimeError as error:
            self._lose(error)
            return []
        self._seen = changes
        return heard

    def tidy(self) -> bool:  # noqa: D102
        return False  # an entry replaces the one before it

    def _read(self, rank: int) -> Message:
        entry = json.loads(self._store.get(str(rank)))
        waits = {channel: Call(**call) for channel, call in entry["waits"].items()}
        return Message(rank, waits, entry["ended"])

    def _lose(self, error: RuntimeError) -> None:
        reason = str(error).splitlines()[0]
        self.lost = f"The store, by which ranks tell that they are there, does not answer ({reason})."
