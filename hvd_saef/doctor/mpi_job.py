"""A job that mpirun or srun has started, and mpi4py connects."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from hvd_saef.doctor import vendors
from hvd_saef.doctor.jobs import MPI, Job
from hvd_saef.transport.process_sets import find_hosts

PAUSE = 0.01
"""The seconds between two looks of a waiting rank whether all have come: MPI's own barrier keeps the core."""


class MpiJob(Job):
    """All ranks of an MPI job. Without Horovod, and with any level of threads: these are what is examined."""

    carrier = MPI

    def __init__(self, mpi: Any) -> None:
        """Take mpi4py's module MPI. Collective."""
        self._world = mpi.COMM_WORLD
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()
        self.host = mpi.Get_processor_name()
        self.hosts = find_hosts(self._world)
        self.speaks = self.rank == 0

    def gather(self, value: Any) -> list[Any] | None:  # noqa: D102
        everyone: list[Any] | None = self._world.gather(value)
        return everyone

    def share(self, value: Any) -> Any:  # noqa: D102
        return self._world.bcast(value)

    def barrier(self) -> None:  # noqa: D102
        done = self._world.Ibarrier()
        while not done.Test():
            time.sleep(PAUSE)

    def send(self, buffer: NDArray[Any], rank: int) -> None:  # noqa: D102
        self._world.Send(buffer, rank)

    def receive(self, buffer: NDArray[Any], rank: int) -> None:  # noqa: D102
        self._world.Recv(buffer, rank)

    def versions(self) -> Mapping[str, str]:  # noqa: D102
        return {"MPI library": vendors.name()}
