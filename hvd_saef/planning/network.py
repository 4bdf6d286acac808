"""Measures what carries the updates, through the transport itself: latencies, rates, means. Collective."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hvd_saef.compression import BUILT_IN, DenseCompressor
from hvd_saef.planning.constants import ETHERNET
from hvd_saef.planning.timing import Clock
from hvd_saef.transport.communicator import Communicator

TINY = 64
"""The bytes of a payload that is sent to measure what a message costs beside its bytes."""
LEAST, MOST = 1 << 20, 64 << 20
"""The bytes that a rank sends in all to measure a rate: as many as take LONG seconds, between these."""
LONG = 0.1
MANY = 20
"""The small calls of one turn."""
Begin = Callable[[str], None]


@dataclass
class Network:
    """The constants of a network."""

    seconds: dict[str, float]
    """By feature: all general ones but "fixed" and "land", and the costs of what is averaged."""
    bandwidth: float | None
    """The bits a second that a node sends to others; None on one node."""
    inside: float | None
    """The bits a second that a rank sends to the others of its node; None where it has no others."""
    estimated: list[str]
    """The features that these ranks cannot tell."""


def measure_network(clock: Clock, hosts: Sequence[Sequence[int]], begin: Begin) -> Network:
    """Returns the constants of the network between these ranks, two or more. Collective.

    `hosts` are the ranks of each host, and `begin` is told what is measured. The first error of a collective
    is raised on all ranks that take part in it.
    """
    found, estimated = _latencies(clock, hosts, begin)
    communicator, several = clock.communicator, len(hosts) > 1
    others = communicator.size - 1
    begin("payloads: the rate")
    large = _enough(clock)
    piece, empty = large // others, found["collective"] + others * found["message"]
    payloads = _above(clock.time(_alltoall(communicator, clock.device, piece)), empty)
    elements = large // 8  # a ring sends 2·(K-1)/K of 4 bytes for each: about as much
    means = {kind: _mean(clock, kind, elements, begin) for kind in _dense()}
    empty = found["mean"] + 2 * others * found["latency"]
    seconds = {kind: _above(taken, empty) for kind, taken in means.items()}
    size, ring = communicator.size, 2 * others / communicator.size
    leaves = max(len(ranks) * (size - len(ranks)) for ranks in hosts) * piece if several else large
    float32 = next(iter(seconds))
    rate = 8 * max(leaves / payloads, ring * 4 * elements / seconds[float32])
    found["wire"] = 1.0
    found["byte"] = max(0.0, payloads - 8 * leaves / rate) / large if several else payloads / large
    for kind, taken in seconds.items():
        wire = 8 * ring * elements * _dense()[kind].itemsize / rate
        found[kind] = max(0.0, taken - wire) / elements
    inside = _inside(clock, hosts, large, begin) if several else rate
    return Network(found, rate if several else None, inside, estimated)


def _above(taken: float, empty: float) -> float:
    """Returns the seconds that a large call takes longer than an `empty` one; by noise they could be none."""
    return max(taken - empty, taken / 100)


def _dense() -> dict[str, torch.dtype]:
    """Returns the dtype in which each compressor without payloads travels, by the name of its cost."""
    kinds = [kind for kind in BUILT_IN if issubclass(kind, DenseCompressor)]
    return {kind.costs[0]: kind().wire_dtype(torch.float32) for kind in kinds}


def _latencies(
    clock: Clock, hosts: Sequence[Sequence[int]], begin: Begin
) -> tuple[dict[str, float], list[str]]:
    """Returns "message", "collective", "latency" and "mean", and which of them are estimated.

    What a message costs more, and a level of a tree, is told from what pairs of ranks take and what all take
    together. On two ranks, and where more ranks are not slower, nothing tells that; then it is estimated,
    but no higher than all that was measured.
    """
    whole = clock.communicator
    pair = _pair(whole, hosts)
    begin("payloads: the latency")
    everyone = clock.time(_alltoall(whole, clock.device, TINY), MANY)
    two = clock.time(_alltoall(pair, clock.device, TINY), MANY) if whole.size > 2 else everyone
    begin("agreements: the latency")
    levels = math.ceil(math.log2(whole.size))
    tree = clock.time(lambda: whole.combine(0), MANY)
    level = clock.time(lambda: pair.combine(0), MANY) if whole.size > 2 else tree
    found: dict[str, float] = {}
    estimated = []
    for name, more, few, units in (
        ("message", everyone, two, whole.size - 2),
        ("latency", tree, level, levels - 1),
    ):
        if units and more > few:
            found[name] = min(few, (more - few) / units)
        else:
            found[name] = min(ETHERNET[name], few)
            estimated.append(name)
    found["collective"] = max(0.0, two - found["message"])
    begin("means: the latency")
    one = torch.ones(1, device=clock.device)
    mean = clock.time(lambda: whole.allreduce_mean(one, "calibrate.one"), MANY)
    found["mean"] = max(0.0, mean - 2 * (whole.size - 1) * found["latency"])
    return found, estimated


def _pair(whole: Communicator, hosts: Sequence[Sequence[int]]) -> Communicator:
    """Returns the communicator of this rank and one other, of another host if there is one."""
    by_place = [rank for ranks in itertools.zip_longest(*hosts) for rank in ranks if rank is not None]
    for first in range(0, len(by_place), 2):
        ranks = sorted(by_place[first : first + 2])
        if whole.rank in ranks:
            return whole if len(ranks) == whole.size else whole.part(ranks)
    raise AssertionError(f"rank {whole.rank} is on none of the hosts {hosts}")


def _alltoall(communicator: Communicator, device: torch.device, piece: int) -> Callable[[], None]:
    """Returns a call that sends `piece` bytes to each other rank; one rank alone does nothing."""
    size = communicator.size
    if size == 1:
        return lambda: None  # it still takes part in the timing
    leaving, arriving = (torch.zeros(size * piece, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: communicator.alltoall(torch.split(leaving, piece), torch.split(arriving, piece))


def _enough(clock: Clock) -> int:
    """Returns how many bytes a rank sends to measure a rate, a multiple of K - 1. Collective."""
    others, size = clock.communicator.size - 1, LEAST
    while size < MOST:
        if clock.once(_alltoall(clock.communicator, clock.device, size // others)) >= min(
            LONG, clock.seconds
        ):
            break
        size *= 4
    return size // others * others


def _mean(clock: Clock, kind: str, elements: int, begin: Begin) -> float:
    """Returns the seconds of a mean of float32 elements that travel as a dtype. Collective."""
    dtype = _dense()[kind]
    begin(f"{kind} means: the rate")
    numbers = torch.ones(elements, device=clock.device)
    travels = numbers if dtype == numbers.dtype else numbers.to(dtype)

    def call() -> None:
        if travels is not numbers:
            travels.copy_(numbers)
        clock.communicator.allreduce_mean(travels, f"calibrate.{kind}")
        if travels is not numbers:
            numbers.copy_(travels)

    return clock.time(call)


def _inside(clock: Clock, hosts: Sequence[Sequence[int]], large: int, begin: Begin) -> float | None:
    """Returns the bits a second that a rank sends to the others of its node, all nodes at a time."""
    begin("inside nodes: the rate")
    most = max(len(ranks) for ranks in hosts)
    if most == 1:
        return None
    own = next(ranks for ranks in hosts if clock.communicator.rank in ranks)
    node = clock.communicator.part(own)
    piece = large // (most - 1)
    empty = clock.time(_alltoall(node, clock.device, TINY), MANY)
    return 8 * piece * (most - 1) / _above(clock.time(_alltoall(node, clock.device, piece)), empty)
