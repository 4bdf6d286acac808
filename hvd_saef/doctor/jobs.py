"""What the doctor asks of the job that this process is in: who is there, and messages between the ranks."""

from __future__ import annotations

import abc
import importlib.util
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from numpy.typing import NDArray

from hvd_saef.doctor.findings import Finding
from hvd_saef.transport.libraries import mpi4py

MPI, TORCH = "MPI", "torch.distributed"
"""Who may carry the updates."""


class Job(abc.ABC):
    """The ranks of one job. A method is collective unless its docstring says otherwise."""

    carrier: str
    """MPI or TORCH: who carries the updates in such a job."""
    rank: int
    size: int
    host: str
    """The name of this rank's host."""
    hosts: Sequence[Sequence[int]]
    """The ranks of each host, as the transport groups them for worker="node"."""
    trouble: Finding | None = None
    """Why this rank is alone although other ranks were started, if that is so."""
    speaks: bool
    """True if this rank prints the report."""

    def neighbours(self) -> int:
        """Returns the number of ranks on this host, this rank included. Local."""
        return next(len(ranks) for ranks in self.hosts if self.rank in ranks)

    def allgather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in rank order."""
        everyone: list[Any] = self.share(self.gather(value))
        return everyone

    @abc.abstractmethod
    def gather(self, value: Any) -> list[Any] | None:
        """Returns the values of all ranks on rank 0, in rank order, and None on the other ranks."""

    @abc.abstractmethod
    def share(self, value: Any) -> Any:
        """Returns the value of rank 0."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """Waits for all ranks. A rank that waits leaves its core to others."""

    def connect(self) -> str:
        """Opens the connections for send() and receive(); returns why that fails, or ""."""
        return ""

    @abc.abstractmethod
    def send(self, buffer: NDArray[Any], rank: int) -> None:
        """Sends a buffer to a rank, which receives it. Local."""

    @abc.abstractmethod
    def receive(self, buffer: NDArray[Any], rank: int) -> None:
        """Receives what a rank sends, of the size of the buffer. Local."""

    @abc.abstractmethod
    def versions(self) -> Mapping[str, str]:
        """Returns the versions of what carries, which must be the same on all ranks. Local."""

    def end(self) -> None:
        """Leaves the job."""
        return


class Alone(Job):
    """This process alone: no launcher started others, or it cannot find them, as `trouble` says."""

    rank, size, speaks = 0, 1, True

    def __init__(self, carrier: str, trouble: Finding | None = None) -> None:
        self.carrier, self.trouble = carrier, trouble
        self.host, self.hosts = socket.gethostname(), [[0]]

    def gather(self, value: Any) -> list[Any] | None:  # noqa: D102
        return [value]

    def share(self, value: Any) -> Any:  # noqa: D102
        return value

    def barrier(self) -> None:  # noqa: D102
        return

    def send(self, buffer: NDArray[Any], rank: int) -> None:  # noqa: D102
        raise NotImplementedError("this process is alone")

    def receive(self, buffer: NDArray[Any], rank: int) -> None:  # noqa: D102
        raise NotImplementedError("this process is alone")

    def versions(self) -> Mapping[str, str]:  # noqa: D102
        return {}


def find_job() -> Job:
    """Returns the job that this process was started in. Collective over the ranks of the job.

    RANK in the environment, as torchrun sets it, means torch.distributed. Otherwise MPI carries, which is
    started. A process without mpi4py and Horovod is one that torchrun could start.
    """
    from hvd_saef.doctor.mpi_job import MpiJob
    from hvd_saef.doctor.torch_job import join

    if "RANK" in os.environ:
        return join()
    if not is_installed("horovod") and not is_installed("mpi4py") and has_gloo():
        return Alone(TORCH)
    return MpiJob(mpi4py()) if mpi4py() else Alone(MPI)


def is_installed(package: str) -> bool:
    """Returns True if the package is there, whether it can be imported or not. Imports nothing. Local."""
    return importlib.util.find_spec(package) is not None


def has_gloo() -> bool:
    """Returns True if this torch has torch.distributed with gloo. Local."""
    return dist.is_available() and dist.is_gloo_available()
