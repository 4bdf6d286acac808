"""How many torch operations the twins take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hvd_saef import Compression, kernels
from hvd_saef.compression import BlockedTensor, Blocks, Memory
from hvd_saef.memory.algorithm import PlainRows


class Counted(TorchDispatchMode):
    """Counts all torch operations."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


RESNET = [512 * 512 * 9, *(64 * i for i in range(1, 160)), 1000]
"""161 tensors of different sizes; the largest is that of ResNet-50."""


@pytest.mark.parametrize("block_size", [None, 4096])
def test_operations_do_not_depend_on_the_tensors(block_size: int | None) -> None:
    """A step of a bucket: row 4, row 5' with one worker's payload, rows 6 and 2."""
    blocks, compressor = Blocks.cut(RESNET, block_size, torch.float32), Compression.sign
    x, e, y, s = (torch.randn(blocks.numel) for _ in range(4))
    pieces = list(y.split(RESNET))
    memory = Memory(blocks, x, e, None, pieces, 1.0, 0.0)
    sent, answer = (torch.zeros(compressor.payload_bytes(blocks), dtype=torch.uint8) for _ in range(2))
    with kernels.only("twins"):
        rows = PlainRows(compressor)
        rows.send([memory], [sent])  # plans the bucket
        with Counted() as counted:
            rows.send([memory], [sent])
            rows.serve([sent], [1.0], BlockedTensor(s, blocks), answer)
            rows.receive([memory], [sent], [[answer]], [1.0])
    assert 50 < counted.number <= 200
