"""Counts an optimizer's bytes and seconds. Local.

What a GPU does is timed by events in the stream that does it, and not by when the calls return.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvd_saef.transport import streams
from hvd_saef.transport.communicator import Communicator
from hvd_saef.transport.streams import Timestamp

PHASES = ("agreement", "local_step", "encode", "exchange", "decode", "averaging", "node")
HOST = torch.device("cpu")
_adding = threading.Lock()  # buckets land in two threads, which both add seconds


@dataclass
class Statistics:
    """The bytes that this worker sent and received, and its seconds by phase, since wrapping.

    All bytes but `node_bytes_sent` go between workers, and are the sum over all ranks of this worker.
    """

    skipped: int = 0
    payload_bytes_sent: int = 0
    payload_bytes_received: int = 0
    averaging_bytes_sent: int = 0
    dense_bytes_sent: int = 0
    ring_allreduce_bytes: int = 0
    node_bytes_sent: int = 0
    """The bytes that this rank sent to other ranks of its team.

    They are gradients, and this rank's slices of what came from other workers.
    """
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    _pending: deque[tuple[str, Timestamp, Timestamp]] = field(default_factory=deque)
    """The beginnings and ends of phases whose seconds have not been added yet."""

    @contextmanager
    def phase(self, name: str, device: torch.device = HOST) -> Iterator[None]:
        """Adds to phase `name` the time that the work inside the context takes, on the `device`."""
        start = streams.of(device).timestamp()
        try:
            yield
        finally:
            end = streams.of(device).timestamp()
            with _adding:
                if end.at_once:  # without a look at what is pending, which a capture of a graph forbids
                    self.seconds[name] += end.since(start)
                else:
                    self._pending.append((name, start, end))
                    self._add_seconds(wait=False)

    def _add_seconds(self, wait: bool) -> None:
        """Adds the seconds of phases that are over, up to the first one that is not; with `wait`, of all."""
        while self._pending and (wait or self._pending[0][2].over):
            name, start, end = self._pending.popleft()
            self.seconds[name] += end.since(start)

    def count_payloads(
        self,
        communicator: Communicator,
        sizes: Sequence[int],
        *,
        mine: int,
        mean: Tensor | None,
        elements: int,
    ) -> None:
        """Adds one bucket's exchange. Its payload has parts of `sizes` bytes; this worker serves part `mine`.

        `mean` is what Horovod averaged, if that was so; `elements` is the number of the bucket's elements.
        """
        others, total = communicator.workers - 1, sum(sizes)
        own = sizes[mine if len(sizes) > 1 else 0]
        if mean is not None:
            self.dense_bytes_sent += ring_bytes(communicator.workers, total)
            self.node_bytes_sent += communicator.passed_on_of_mean(mean)
        elif len(sizes) > 1:  # a part to each of the others, and this one's answer to all of them
            self.payload_bytes_sent += total - own + others * own
            self.payload_bytes_received += others * own + total - own
            answers = [size for k, size in enumerate(sizes) if k != mine]
            self.node_bytes_sent += communicator.passed_on(others * [own] + answers)
        else:
            self.payload_bytes_sent += others * total
            self.payload_bytes_received += others * total
            self.node_bytes_sent += communicator.passed_on(others * [total])
        self.ring_allreduce_bytes += ring_bytes(communicator.workers, 4 * elements)

    @property
    def compression_ratio(self) -> float:
        """The bytes of a float32 ring allreduce divided by the bytes sent; 1 if nothing was sent."""
        sent = self.payload_bytes_sent + self.averaging_bytes_sent + self.dense_bytes_sent
        return self.ring_allreduce_bytes / sent if sent else 1.0

    def as_dict(self) -> dict[str, float]:
        """Returns all of these numbers by name; the seconds are under `seconds_<phase>`.

        Waits until a GPU has done what it is timed for.
        """
        with _adding:
            self._add_seconds(wait=True)
        numbers: dict[str, float] = {
            name: value for name, value in vars(self).items() if isinstance(value, (int, float))
        }
        numbers["compression_ratio"] = self.compression_ratio
        return numbers | {f"seconds_{name}": value for name, value in self.seconds.items()}


def ring_bytes(workers: int, size: int) -> int:
    """Returns the bytes that each of K workers sends in a ring allreduce of `size` bytes: 2·(K-1)/K·size."""
    return 2 * (workers - 1) * size // workers
