"""Measures how fast hosts exchange bytes, once for every pair of hosts. Collective."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd_saef.doctor.jobs import Job

MESSAGE = 4 << 20
"""The bytes of the message by which a link's rate is timed."""
PINGS, REPEATS = 20, 3
"""The round trips of one byte, whose mean counts, and those of a message, whose fastest counts."""


@dataclass(frozen=True)
class Link:
    """The measurements between two hosts: half of a round trip."""

    hosts: tuple[str, str]
    seconds: float
    """The seconds that one byte takes."""
    bits_per_second: float
    """The rate of a large message."""

    def __str__(self) -> str:
        rate, unit = self.bits_per_second / 1e9, "Gbit/s"
        if rate < 1:
            rate, unit = rate * 1e3, "Mbit/s"
        return f"{self.hosts[0]}–{self.hosts[1]} {rate:.3g} {unit}, {self.seconds * 1e3:.3g} ms"


def pairings(number: int) -> Iterator[list[tuple[int, int]]]:
    """Yields the rounds of a tournament of `number` hosts, as lists of pairs.

    Each host meets each other host once, and is in a round once at most.
    """
    seats = list(range(number + number % 2))  # the seat added to an odd number is empty: its opposite pauses
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in facing if max(pair) < number]
        seats[1:] = [seats[-1], *seats[1:-1]]


def time_links(job: Job) -> list[Link]:
    """Returns the links between all hosts, on every rank. Collective, after job.connect().

    One rank of each host exchanges the messages. Pairs that have no host in common are timed at the same
    time, since they exchange at the same time in training.
    """
    hosts = job.allgather(job.host)
    names = list(dict.fromkeys(hosts))
    speakers = [hosts.index(name) for name in names]
    links: list[Link] = []
    for pairs in pairings(len(names)):
        for first, second in pairs:
            if job.rank in (speakers[first], speakers[second]):
                other = speakers[second] if job.rank == speakers[first] else speakers[first]
                seconds, rate = _time(job, other, begins=job.rank == speakers[first])
                if job.rank == speakers[first]:
                    links.append(Link((names[first], names[second]), seconds, rate))
        job.barrier()
    return [link for some in job.allgather(links) for link in some]


def _time(job: Job, other: int, begins: bool) -> tuple[float, float]:
    small, large = np.zeros(1, np.uint8), np.zeros(MESSAGE, np.uint8)

    def there_and_back(buffer: Any) -> float:
        start = time.perf_counter()
        if begins:
            job.send(buffer, other)
            job.receive(buffer, other)
        else:
            job.receive(buffer, other)
            job.send(buffer, other)
        return time.perf_counter() - start

    there_and_back(large)  # the first message opens the connection, so its time does not count
    pings = sum(there_and_back(small) for _ in range(PINGS)) / PINGS
    return pings / 2, 8 * MESSAGE / (min(there_and_back(large) for _ in range(REPEATS)) / 2)
