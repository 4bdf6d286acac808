"""A job of torch.distributed: its ranks know who they are by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

The ranks meet at the store of MASTER_ADDR, which is all that the doctor needs to tell what it found; gloo
is started after that, so that a gloo that finds no connection is a finding and no silence.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import socket
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hvd_saef.doctor.findings import Finding, failure, some
from hvd_saef.doctor.jobs import TORCH, Alone, Job, has_gloo
from hvd_saef.errors import StalledExchangeError
from hvd_saef.transport.hosts import group_by_host, this_host
from hvd_saef.transport.stores import first_line
from hvd_saef.transport.watch import Patience

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LONGEST = 300.0
"""The seconds to wait for other ranks, unless HVD_SAEF_STALL_ABORT_S says so."""
STARTS = "start the ranks by torchrun, or by launch/slurm/rank.sh, which sets these variables"
REACHES = (
    "set MASTER_ADDR to the name or address of rank 0's host, as all hosts know it, and MASTER_PORT to a "
    "port that is free there and that no firewall closes"
)


def join() -> Job:
    """Returns the job of this process's RANK; or this process alone, with the trouble. Collective."""
    absent = [name for name in NAMES if not os.environ.get(name)]
    if absent:
        found = f"RANK={os.environ['RANK']}, but {' and '.join(absent)} not set: the ranks cannot meet"
        return _alone(failure("ranks", found, STARTS))
    if not has_gloo():
        found = "this torch has no gloo, and RANK is set, as torchrun does"
        return _alone(failure("ranks", found, "install a torch that has torch.distributed with gloo"))
    try:
        job = TorchJob(_store())
    except (RuntimeError, ValueError) as error:
        return _alone(_unreachable(error))
    try:
        job.meet()
    except StalledExchangeError as error:
        fix = "look at their logs and hosts: not started, ended, stopped, or MASTER_ADDR cannot be reached"
        return _alone(failure("ranks", str(error), fix))
    return job


def _alone(trouble: Finding) -> Alone:
    alone = Alone(TORCH, trouble)
    alone.speaks = os.environ["RANK"] == "0"
    return alone


class TorchJob(Job):
    """All ranks of a torch.distributed job."""

    carrier = TORCH

    def __init__(self, store: Any) -> None:
        """Use a store that all ranks have. Local."""
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.host, self.hosts = socket.gethostname(), []
        self.speaks = self.rank == 0
        self._store, self._calls = store, 0

    def meet(self) -> None:
        """Finds all ranks and their hosts. Raises StalledExchangeError if some do not come. Collective."""
        self.hosts = group_by_host(self.allgather(this_host()))

    def gather(self, value: Any) -> list[Any] | None:  # noqa: D102
        call = self._next()
        self._store.set(f"{call}/{self.rank}", pickle.dumps(value))
        if self.rank:
            return None
        keys = [f"{call}/{rank}" for rank in range(self.size)]
        self._wait(keys, lambda: [rank for rank, key in enumerate(keys) if not self._store.check([key])])
        return [pickle.loads(self._store.get(key)) for key in keys]

    def share(self, value: Any) -> Any:  # noqa: D102
        key = str(self._next())
        if self.rank == 0:
            self._store.set(key, pickle.dumps(value))
        self._wait([key], lambda: [0])
        return pickle.loads(self._store.get(key))

    def barrier(self) -> None:  # noqa: D102
        self.share(self.gather(None))

    def connect(self) -> str:  # noqa: D102
        where = dist.PrefixStore("gloo", self._store)  # type: ignore[attr-defined]
        limit = timedelta(seconds=patience() / 2)
        try:
            dist.init_process_group("gloo", store=where, rank=self.rank, world_size=self.size, timeout=limit)
        except (RuntimeError, ValueError) as error:
            return first_line(error)
        return ""

    def send(self, buffer: NDArray[Any], rank: int) -> None:  # noqa: D102
        dist.send(torch.from_numpy(buffer), rank)

    def receive(self, buffer: NDArray[Any], rank: int) -> None:  # noqa: D102
        dist.recv(torch.from_numpy(buffer), rank)

    def versions(self) -> Mapping[str, str]:  # noqa: D102
        return {"NCCL": nccl() or "none"}

    def end(self) -> None:
        """Leaves; rank 0, which may serve the store, is the last."""
        self.gather(None)
        if dist.is_initialized():
            dist.destroy_process_group()

    def _next(self) -> int:
        self._calls += 1
        return self._calls

    def _wait(self, keys: list[str], missing: Callable[[], Iterable[int]]) -> None:
        """Waits for keys of the store. Raises StalledExchangeError, with the ranks `missing`."""
        limit = patience() * (1 if self.rank == 0 else 2)  # rank 0 knows best who is missing: it is the first
        try:
            self._store.wait(keys, timedelta(seconds=limit))
        except RuntimeError as error:
            try:
                who = list(missing())
            except RuntimeError:  # the store itself is gone
                who = []
            ranks = f"rank {some(who)} of {self.size}" if who else f"the store ({first_line(error)})"
            raise StalledExchangeError(f"no answer from {ranks} within {limit:g} s") from error


def patience() -> float:
    """Returns the seconds that ranks wait for each other. Local."""
    limit = Patience.of_environment().abort
    return limit if limit < math.inf else LONGEST


def nccl() -> str:
    """Returns the version of this torch's NCCL, or "". Local."""
    if not dist.is_nccl_available():
        return ""
    known: Any = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, known)) if isinstance(known, tuple) else str(known)


def torchrun_serves() -> bool:
    """Returns True if the store is in torchrun's process, and not in that of rank 0. Local."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store() -> Any:
    """Connects to the store, which rank 0 serves unless torchrun does. Raises RuntimeError or ValueError."""
    serves = os.environ["RANK"] == "0" and not torchrun_serves()
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        serves,
        timedelta(seconds=patience()),
        wait_for_workers=False,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"hvd-saef doctor/{attempt}", store)  # type: ignore[attr-defined]


def _unreachable(error: Exception) -> Finding:
    """Returns the finding of a rank that cannot reach the store."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    said = first_line(error)
    if re.search(r"EADDRINUSE|in use", str(error)):
        fix = "choose another MASTER_PORT; torchrun: --master-port, or --standalone on one host"
        return failure("MASTER_PORT", f"MASTER_PORT={port} is in use on this host", fix)
    try:
        socket.getaddrinfo(host, None)
    except OSError as unknown:
        said = f"the name does not resolve: {unknown.strerror}"
    return failure("MASTER_ADDR", f"no connection to MASTER_ADDR={host} MASTER_PORT={port} ({said})", REACHES)
