"""torch.distributed between threads, for tests of streams: gloo or NCCL as tests/stand_in.py sees them.

The library's own code of the transport runs; only the group's collectives are others. Local: nothing here
starts a process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hvd_saef.simulation import run_workers
from hvd_saef.transport.communicator import Channel, Communicator
from hvd_saef.transport.find import set_thread_communicator
from hvd_saef.transport.staging import Staging
from hvd_saef.transport.threads import Meeting, Meetings, ThreadCommunicator
from hvd_saef.transport.torch_distributed import GroupCommunicator
from tests import stand_in as cuda
from tests.stand_in import OnGpu, Stream


class Work:
    """What a collective returns, which is done."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def is_completed(self) -> bool:
        """See torch: the host knows that NCCL's stream has done it."""
        if self._stream is not None:
            cuda.CURRENT.thread().learn(self._stream.known)
        return True

    def wait(self) -> None:
        """See torch."""


class Group:
    """A group of threads: over gloo, or over NCCL with a stream of its own."""

    def __init__(self, meeting: Meeting, own: int, nccl: bool) -> None:
        self._meeting, self._own = meeting, own
        self._stream = Stream(cuda.GPU) if nccl else None

    def meet(
        self, what: str, mine: Sequence[Tensor], out: Sequence[Tensor], fill: Callable[[list[Any]], None]
    ) -> Work:
        """A collective that reads `mine` and writes `out`, as `fill` does with what all ranks have read."""
        name, device = threading.current_thread().name, torch.cuda.current_device()
        if name.startswith("hvd_saef") and device != cuda.GPU.index:
            cuda.CURRENT.complaints.append(f"{what} on device {device} in {name}")
        if self._stream is None:
            cuda.CURRENT.on_host(f"gloo's {what} reads", mine)
        else:
            self._stream.learn(cuda.CURRENT.stream(cuda.GPU).known)
            cuda.CURRENT.submit(f"NCCL's {what}", cuda.GPU, [*mine, *out], out, stream=self._stream)
        fill(self._meeting.exchange(self._own, what, [_inside(one).clone() for one in mine]))
        if self._stream is None:
            cuda.CURRENT.on_host(f"gloo's {what} writes", out, out)
        return Work(self._stream)


def _inside(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, OnGpu) else tensor


def _all_gather(out: Sequence[Tensor], mine: Tensor, group: Group, async_op: bool) -> Work:
    def fill(everyone: list[list[Tensor]]) -> None:
        for place, (theirs,) in zip(out, everyone, strict=True):
            _inside(place).copy_(theirs)

    return group.meet("all_gather", [mine], out, fill)


def _all_to_all_single(
    out: Tensor, mine: Tensor, to: list[int], of: list[int], group: Group, async_op: bool
) -> Work:
    def fill(everyone: list[list[Any]]) -> None:
        pieces = [torch.split(theirs, sizes.tolist()) for theirs, sizes in everyone]
        rank = group._meeting.ranks.index(group._own)
        _inside(out).copy_(torch.cat([theirs[rank] for theirs in pieces]))

    return group.meet("all_to_all", [mine, torch.tensor(of)], [out], fill)


def _all_reduce(tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Work:
    def fill(everyone: list[list[Tensor]]) -> None:
        _inside(tensor).copy_(torch.stack([theirs for (theirs,) in everyone]).sum(0))

    return group.meet("all_reduce", [tensor], [tensor], fill)  # type: ignore[no-any-return]


class Pretended(GroupCommunicator):
    """A communicator of torch.distributed, whose groups are of threads."""

    def __init__(
        self,
        meetings: Meetings,
        ranks: Sequence[int],
        own: int,
        hosts: list[list[int]],
        backend: str,
        line: int = 0,
    ) -> None:
        self._all_meetings, self._own, self._hosts = meetings, own, hosts
        self._among_threads = ThreadCommunicator(meetings, ranks, own, hosts, line)
        self.rank, self.size, self.ranks = self._among_threads.rank, len(ranks), ranks
        self._backend, self._line = backend, line
        found = meetings.of(ranks, line)
        nccl = "nccl" in backend
        self._groups = {channel: Group(found[channel], own, nccl) for channel in Channel}
        self._staging = {channel: Staging(self._reaches, follows=True) for channel in Channel}

    def new_line(self, number: int) -> Communicator:  # noqa: D102
        return Pretended(self._all_meetings, self.ranks, self._own, self._hosts, self._backend, number)

    def new_part(self, ranks: Sequence[int], names: Sequence[int]) -> Communicator:  # noqa: D102
        return Pretended(self._all_meetings, ranks, self._own, [], self._backend)

    def find_hosts(self) -> list[list[int]]:  # noqa: D102
        return self._hosts

    def check(self) -> None:  # noqa: D102
        pass

    def broadcast(self, tensor: Tensor, root: int) -> None:  # noqa: D102
        self._among_threads.broadcast(tensor, root)

    def allgather_object(self, value: Any) -> list[Any]:  # noqa: D102
        return self._among_threads.allgather_object(value)

    def combine(self, word: int) -> int:  # noqa: D102
        return self._among_threads.combine(word)

    def _wait_until(self, done: Callable[[], bool], channel: Channel, operation: str) -> None:
        assert done()


@contextmanager
def _collectives() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", _all_gather)
        patch.setattr(dist, "all_to_all_single", _all_to_all_single)
        patch.setattr(dist, "all_reduce", _all_reduce)
        yield


def run_pretended(ranks: int, backend: str, fn: Callable[[int], Any]) -> list[Any]:
    """`run_workers`, whose threads communicate by gloo or NCCL, as far as they can tell."""
    meetings, everyone = Meetings(), range(ranks)

    def work(rank: int) -> Any:
        communicator = Pretended(meetings, everyone, rank, [[one] for one in everyone], backend)
        set_thread_communicator(communicator)
        try:
            return fn(rank)
        finally:
            meetings.leave(rank)
            communicator.close()

    with _collectives():
        return run_workers(ranks, work)
