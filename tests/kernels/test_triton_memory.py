"""The memory that the Triton kernels need beside what they are given. Nothing is launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hvd_saef import Compression, Compressor, kernels
from hvd_saef.compression import BlockedTensor, Blocks, Memory

pytest.importorskip("triton", "3.6", reason="needs Triton 3.6 or newer")
CPU = torch.device("cpu")
COUNT = 3
"""Blocks of a size."""


class Allocated(TorchDispatchMode):
    """Adds up the bytes of new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
            self.bytes += result.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("size", [100, 4096, 4097, 5000, 8193, 16384, 70000, 1 << 20])
@pytest.mark.parametrize(
    ("compressor", "dtype", "most"),
    [
        (Compression.sign, torch.float32, 1.0),
        (Compression.sign, torch.float64, 1.0),
        (Compression.topk(0.01), torch.float32, 1.0),
        (Compression.topk(0.01), torch.float64, 6.1),
    ],
    ids=str,
)
def test_bytes_an_element(
    compressor: Compressor, dtype: torch.dtype, most: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tables need does not grow with the blocks, and is made once: it is not counted."""
    from hvd_saef.kernels.on_triton import sign, topk

    for module in (sign, topk):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
    monkeypatch.setattr(topk, "AT_ONCE", ())  # as on a GPU
    blocks = Blocks.cut([COUNT * size], size, dtype)
    x, e, y = (torch.zeros(blocks.numel, dtype=dtype) for _ in range(3))
    memories = [Memory(blocks, x, e, None, [y], 1.0, 0.0)]
    payload = torch.zeros(compressor.payload_bytes(blocks), dtype=torch.uint8)
    with kernels.only("triton"):
        rows = compressor.fused(CPU, dtype, True)
        assert rows is not None

        def step() -> None:
            rows.send(memories, [payload])
            rows.serve([payload, payload], [0.5, 0.5], BlockedTensor(torch.zeros_like(x), blocks), payload)
            rows.receive(memories, [payload], [[payload]], [1.0])

        step()
        with Allocated() as allocated:
            step()
    # `send` and `serve` need memory one after the other, and the server's error is the test's own.
    needed = (allocated.bytes - x.nbytes) / 2
    assert needed <= most * blocks.numel
    assert needed > 0 or size <= 8192
