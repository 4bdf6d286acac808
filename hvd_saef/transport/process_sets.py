"""Horovod's process sets for workers of several ranks: which sets are needed, and how they are found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from hvd_saef.transport.hosts import group_by_host
from hvd_saef.transport.libraries import horovod, mpi4py

_given: dict[tuple[int, ...], Any] = {}
"""The process sets that :func:`process_sets` returned, or that were added here, by their ranks."""


def process_sets(worker: str | Sequence[Any] = "node") -> list[Any]:
    """Returns the process sets that hvd.init() needs for optimizers with this `worker`.

    >>> hvd.init(process_sets=hvd_saef.process_sets())

    Collective over all ranks. The result has a process set for each worker, then one for the ranks at the
    same place in each worker; sets of one rank or of all ranks are left out. With
    hvd.init(process_sets="dynamic") this call is not needed, but Horovod's ranks then exchange one more
    message in each of Horovod's cycles, also between nodes.

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
    """Returns the groups of ranks of an mpi4py communicator that share memory. Collective over it."""
    shares = communicator.Split_type(mpi4py().COMM_TYPE_SHARED)
    first = communicator.allgather(shares.bcast(communicator.Get_rank()))
    shares.Free()
    return group_by_host(first)


def ranks_of(group: Any) -> list[int]:
    """Returns the sorted ranks of a process set, or of a list of ranks. Local."""
    return sorted(getattr(group, "ranks", group))


def lanes(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Returns the ranks at the same place in each group, one list for each place that all groups have."""
    return [[group[place] for group in groups] for place in range(min(map(len, groups)))]


def wanted(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Returns the sets of two or more ranks that compute means: the groups, then the :func:`lanes`."""
    return [sorted(ranks) for ranks in (*groups, *lanes(groups)) if len(ranks) > 1]


def remember(process_sets: Iterable[Any]) -> None:
    """Records process sets that the user made; other values in `process_sets` are ignored. Local."""
    _given.update({tuple(known.ranks): known for known in process_sets if hasattr(known, "process_set_id")})


def register(groups: Sequence[Sequence[int]], add: bool) -> dict[tuple[int, ...], Any]:
    """Returns Horovod's process set for each set of ranks in :func:`wanted`, keyed by its ranks.

    With `add`, adds missing sets to Horovod, and is collective over all ranks. Raises ValueError if Horovod
    does not know a set, after all additions were tried.
    """
    hvd = horovod()
    apart = [ranks for ranks in wanted(groups) if len(ranks) < hvd.size()]
    for ranks in apart if add else ():
        with contextlib.suppress(ValueError):  # the set exists already, or Horovod cannot add sets
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
