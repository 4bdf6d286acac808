"""Payloads that the transport does not reach: copied through page-locked memory.

No GPU: tests/stand_in.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hvd_saef.transport.staging import Staging, reaches_mpi
from tests.stand_in import GPU, OnGpu, stand_in


def pieces() -> list[torch.Tensor]:
    return [torch.arange(first, first + size, dtype=torch.uint8) for first, size in ((0, 5), (9, 0), (7, 3))]


def test_copies_lie_end_to_end_in_page_locked_memory() -> None:
    with stand_in() as recorder, torch.cuda.device(GPU):
        channel = Staging(lambda device: device.type == "cpu")
        places = [recorder.to_gpu(torch.zeros_like(piece)) for piece in pieces()]
        for _ in range(2):
            copies = channel.leaving([recorder.to_gpu(piece) for piece in pieces()])
            recorder.on_host("the transport", copies)
            room = channel.room(places)
            assert not any(isinstance(one, OnGpu) for one in (*copies, *room))
            for space, copy in zip(room, copies, strict=True):
                space.copy_(copy)
            channel.landed(room, places)
        assert len(recorder.pinned) == 2  # used again
        assert not recorder.complaints
        for place, piece in zip(places, pieces(), strict=True):
            assert torch.equal(place.cpu(), piece)
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    assert [int(copy.storage_offset()) for copy in copies] == [0, 5, 5]


def test_memory_of_the_cpu_needs_neither_streams_nor_locks() -> None:
    with stand_in() as recorder:
        channel = Staging(reaches_mpi)
        channel.ready(torch.device("cpu"))
        channel.landed(channel.leaving(pieces()), pieces())
    assert not recorder.log
    assert not recorder.pinned


def test_copies_from_other_devices_are_waited_for() -> None:
    with stand_in() as recorder:
        channel = Staging(reaches_mpi)
        copies = channel.leaving([recorder.to_gpu(piece, torch.device("mps")).add_(1) for piece in pieces()])
        assert all(torch.equal(copy, piece + 1) for copy, piece in zip(copies, pieces(), strict=True))
        assert not recorder.pinned
        assert not recorder.complaints


@pytest.mark.parametrize(("value", "reached"), [("1", True), ("0", False), (None, False)])
def test_a_cuda_aware_mpi_is_asked_for(value: Any, reached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HVD_SAEF_CUDA_AWARE_MPI", raising=False)
    if value is not None:
        monkeypatch.setenv("HVD_SAEF_CUDA_AWARE_MPI", value)
    assert reaches_mpi(torch.device("cuda", 0)) is reached
    assert reaches_mpi(torch.device("cpu"))
