"""Payloads that MPI does not reach: copied through host memory, in the order that streams ask for.

No GPU: host memory is declared to be a device's, and torch.cuda is a stand-in that notes what is asked of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hvd_saef.transport import staging
from hvd_saef.transport.staging import Staging, reaches_mpi, so_far


class FakeStream:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def wait_event(self, event: FakeEvent) -> None:  # noqa: D102
        self.calls.append(f"{self.name} waits for an event")

    def wait_stream(self, other: FakeStream) -> None:  # noqa: D102
        self.calls.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:  # noqa: D102
        self.calls.append(f"{self.name} is waited for")


class FakeEvent:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def record(self, stream: FakeStream) -> None:  # noqa: D102
        self.calls.append(f"event in {stream.name}")


class Cuda:
    """What is used of torch.cuda."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.made = 0

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: D102
        self.made += 1
        return FakeStream(f"copies {self.made}", self.calls)

    def Event(self) -> FakeEvent:  # noqa: D102
        return FakeEvent(self.calls)

    def current_stream(self, device: torch.device) -> FakeStream:  # noqa: D102
        return FakeStream("computation", self.calls)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:  # noqa: D102
        self.calls.append(f"{stream.name} begin")
        yield
        self.calls.append(f"{stream.name} end")


@contextmanager
def device_of_its_own() -> Iterator[list[str]]:
    """Within, no transport reaches the CPU's tensors; yields what is asked of torch.cuda."""
    with pytest.MonkeyPatch.context() as patch:
        cuda = Cuda()
        patch.setattr(staging, "cuda", cuda)
        patch.setattr(Staging, "direct", lambda self, device: False)
        yield cuda.calls


def pieces() -> list[torch.Tensor]:
    return [torch.arange(first, first + size, dtype=torch.uint8) for first, size in ((0, 5), (9, 0), (7, 3))]


def test_copies_are_between_computation_and_mpi() -> None:
    with device_of_its_own() as calls:
        channel = Staging(staging.reaches_mpi)
        copies = channel.leaving(pieces())
        once = ["copies 1 waits for computation", "copies 1 begin", "copies 1 end", "copies 1 is waited for"]
        assert calls == once
        places = [torch.zeros_like(piece) for piece in pieces()]
        room = channel.room(places)
        for space, copy in zip(room, copies, strict=True):
            space.copy_(copy)
        channel.landed(room, places)
        assert calls == 2 * once  # the channel's one stream
    assert all(torch.equal(place, piece) for place, piece in zip(places, pieces(), strict=True))
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert [int(copy.storage_offset()) for copy in copies] == [0, 5, 5]


def test_host_memory_needs_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(staging, "cuda", cuda)
    channel = Staging(staging.reaches_mpi)
    channel.ready(torch.device("cpu"))
    channel.landed(channel.leaving(pieces()), pieces())
    assert not cuda.calls
    channel.ready(torch.device("cuda", 0))
    assert cuda.calls == ["computation is waited for"]


@pytest.mark.parametrize(("value", "reached"), [("1", True), ("0", False), (None, False)])
def test_a_cuda_aware_mpi_is_asked_for(value: Any, reached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HVD_SAEF_CUDA_AWARE_MPI", raising=False)
    if value is not None:
        monkeypatch.setenv("HVD_SAEF_CUDA_AWARE_MPI", value)
    assert reaches_mpi(torch.device("cuda", 0)) is reached
    assert reaches_mpi(torch.device("cpu"))


def test_another_thread_waits_for_what_was_computed() -> None:
    """Where streams are: the event is noted at once, and waited for where the call is made."""
    with device_of_its_own() as calls:
        wait = so_far(torch.device("cuda"))
        assert calls == ["event in computation"]
        wait()
        assert calls == ["event in computation", "computation waits for an event"]
        calls.clear()
        so_far(torch.device("cpu"))()
        assert not calls
