"""Horovod's process sets for workers of several ranks: which there must be, and where they are found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from hvd_saef.transport.libraries import horovod, mpi4py

_given: dict[tuple[int, ...], Any] = {}
"""By ranks, those that :func:`process_sets` returned or that were added here."""


def process_sets(worker: str | Sequence[Any] = "node") -> list[Any]:
    """What to give to hvd.init() before optimizers with this `worker`. Collective over all ranks.

    >>> hvd.init(process_sets=hvd_saef.process_sets())

    The process sets of more than one rank and less than all: each worker's, then those of the ranks
    of the same place in each worker. hvd.init(process_sets="dynamic") does without this call, but then
    Horovod's ranks exchange a message more in each of its cycles, between nodes as well.

    Raises RuntimeError without Horovod and MPI.
    """
    hvd, MPI = horovod(), mpi4py()  # noqa: N806 - mpi4py's name for it
    if not (hvd and MPI):
        raise RuntimeError("process sets are Horovod's: it and mpi4py are needed.")
    by_host = isinstance(worker, str)
    groups = find_hosts(MPI.COMM_WORLD) if by_host else [ranks_of(group) for group in worker]
    for ranks in wanted(groups):
        if tuple(ranks) not in _given:
            _given[tuple(ranks)] = hvd.ProcessSet(list(ranks))
    everyone = MPI.COMM_WORLD.Get_size()
    return [_given[tuple(ranks)] for ranks in wanted(groups) if len(ranks) < everyone]


def find_hosts(communicator: Any) -> list[list[int]]:
    """The ranks of an mpi4py communicator that share memory, group by group. Collective over it."""
    shares = communicator.Split_type(mpi4py().COMM_TYPE_SHARED)
    first = communicator.allgather(shares.bcast(communicator.Get_rank()))
    shares.Free()
    return [[rank for rank, host in enumerate(first) if host == own] for own in sorted(set(first))]


def ranks_of(group: Any) -> list[int]:
    """Of a process set, or of a list of ranks."""
    return sorted(getattr(group, "ranks", group))


def lanes(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ranks of the same place in each group, for each place that all groups have."""
    return [[group[place] for group in groups] for place in range(min(map(len, groups)))]


def wanted(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """The sets of several ranks whose means are needed."""
    return [sorted(ranks) for ranks in (*groups, *lanes(groups)) if len(ranks) > 1]


def remember(process_sets: Iterable[Any]) -> None:
    """Take in process sets that the user made."""
    _given.update({tuple(known.ranks): known for known in process_sets if hasattr(known, "process_set_id")})


def register(groups: Sequence[Sequence[int]], add: bool) -> dict[tuple[int, ...], Any]:
    """Horovod's process set by ranks, for all that are :func:`wanted`. Collective over all ranks if `add`.

    Raises ValueError if Horovod does not know them and none can be added, after all were tried.
    """
    hvd = horovod()
    apart = [ranks for ranks in wanted(groups) if len(ranks) < hvd.size()]
    for ranks in apart if add else ():
        with contextlib.suppress(ValueError):  # there is one already, or none can be added
            _given[tuple(ranks)] = hvd.add_process_set(ranks)
    found = {tuple(ranks): hvd.global_process_set for ranks in wanted(groups)}
    for ranks in apart:
        key = tuple(ranks)
        if getattr(_given.get(key), "process_set_id", None) is None:
            raise ValueError(
                f"Horovod has no process set of the ranks {ranks} that hvd_saef knows of: call "
                "hvd.init(process_sets=hvd_saef.process_sets()), with the list of groups worker= is, if it "
                'is one; or hvd.init(process_sets="dynamic").'
            )
        found[key] = _given[key]
    return found
