"""Messages between ranks that have all met, in letter boxes: each rank reads its own one.

A box is a store of torch.distributed's that the rank's own process serves. To write into another's box is to
send some bytes and to wait for no answer, so a rank that is stopped or cut off never keeps the others from
telling each other that they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch.distributed as dist

from hvd_saef.transport.hosts import gloo_address
from hvd_saef.transport.posts import Message
from hvd_saef.transport.stores import Entry, client, first_line, read

LONGEST = 30.0
"""The longest that a rank tries to connect to the box of another, in seconds."""


class BoxPost:
    """Messages in boxes: this rank's `own`, and those of the others by their ranks."""

    lost = ""

    def __init__(self, rank: int, own: Any, boxes: Mapping[int, Any]) -> None:
        self._rank, self._own, self._boxes = rank, own, dict(boxes)
        self._entry = Entry()
        self._known: dict[str, bytes] = {}
        self._silent = [str(other) for other in boxes]

    def tell(self, message: Message, ranks: Sequence[int]) -> None:  # noqa: D102
        self._entry.take(message)
        for rank in ranks:
            if rank in self._boxes:
                try:
                    self._boxes[rank].set(str(self._rank), self._entry.text)
                except RuntimeError:  # the rank has ended
                    del self._boxes[rank]

    def hear(self) -> Iterable[Message]:  # noqa: D102
        came = [key for key in self._silent if self._own.check([key])]
        self._silent = [key for key in self._silent if key not in came]
        self._known |= dict.fromkeys(came, b"")
        texts = self._own.multi_get([*self._known]) if self._known else []
        for key, text in zip([*self._known], texts, strict=True):
            if text != self._known[key]:
                self._known[key] = text
                yield read(int(key), text)

    def tidy(self) -> bool:  # noqa: D102
        return False  # an entry replaces the one before it


def open_boxes(
    prefix: str, rank: int, size: int, gather: Callable[[Any], Sequence[Any]]
) -> tuple[BoxPost | None, str]:
    """Connects the boxes of all ranks; this one is number `rank` of `size`. Collective.

    `gather` returns the objects of all ranks, in rank order. Entries of the box begin with `prefix`. Returns
    the post; or None, on all ranks, if any rank cannot reach a box, with the reason on that rank.
    """
    places = gather((gloo_address(), _server().port))
    boxes: dict[int, Any] = {}
    reason = ""
    for other, (host, port) in enumerate(places):
        if other != rank and not reason:
            try:
                boxes[other] = client((host, port), LONGEST, prefix)
            except RuntimeError as error:
                reason = f"the box of rank {other} at {host}:{port} cannot be reached ({first_line(error)})"
    if any(gather(reason)):
        return None, reason
    return BoxPost(rank, client(("127.0.0.1", _server().port), LONGEST, prefix), boxes), ""


@cache
def _server() -> Any:
    """Returns the store that this process serves, at a free port of all its addresses."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
