"""Measures what encoding and decoding cost on this device, on all ranks at once. Collective."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from hvd_saef import kernels
from hvd_saef.compression import BUILT_IN, Blocks, Compressor, Considered, DenseCompressor, Memory
from hvd_saef.memory.algorithm import PlainRows
from hvd_saef.planning.plan import TENSOR
from hvd_saef.planning.timing import Clock
from hvd_saef.settings import Settings

PAYLOADS = 4
"""The payloads that are decoded in one pass, beside a pass with one."""


def considered() -> list[Considered]:
    """Returns the compressors with payloads, one setting of each kind: the first that has two ways."""
    kinds = [kind for kind in BUILT_IN if not issubclass(kind, DenseCompressor)]
    return [next(one for one in kind.considered() if one.double_compression) for kind in kinds]


def measure_codec(clock: Clock, begin: Callable[[str], None]) -> dict[str, float]:
    """Returns the seconds of "land" and of the costs of all compressors with payloads. Collective.

    `begin` is told what is measured. The memory is that of one bucket.
    """
    bench = _Bucket(clock.device)
    begin("gradients: the look at numbers")
    look = clock.time(partial(kernels.squares_fit, bench.memory.parameter_memory)) / bench.elements
    passes: list[tuple[Compressor, float, float, float]] = []
    for one in considered():
        begin(f"{one.title}: encoding and decoding")
        passes.append((one.compressor, *bench.time(one.compressor, clock)))
    land = min(base for _, _, _, base in passes)
    found = {"land": land + look}
    for compressor, encode, decode, base in passes:
        # What one payload costs more to land than another's is put to its encoding: both are passes.
        for work, seconds in ((compressor.work(1, 0), encode + base - land), (compressor.work(0, 1), decode)):
            found |= {name: seconds / units for name, units in work.items() if units}
    return found


class _Bucket:
    """The memory of one bucket, and the passes over it. Times are in seconds for each element."""

    def __init__(self, device: torch.device) -> None:
        count = Settings.bucket_bytes // 4 // TENSOR
        self.blocks = Blocks.cut([TENSOR] * count, None, torch.float32)
        self.elements = self.blocks.numel
        self._generator = torch.Generator(device).manual_seed(0)
        x, e, parameters = (self._numbers(device) for _ in range(3))
        pieces = [piece.clone() for piece in torch.split(parameters, TENSOR)]
        self.memory = Memory(self.blocks, x, e, None, pieces, alpha=1.0, beta=0.0)

    def _numbers(self, device: torch.device) -> torch.Tensor:
        return torch.randn(self.blocks.numel, generator=self._generator, device=device)

    def time(self, compressor: Compressor, clock: Clock) -> tuple[float, float, float]:
        """Returns the seconds of encoding, of decoding a payload, and of the pass that lands. Collective."""
        rows = compressor.fused(clock.device, torch.float32, True) or PlainRows(compressor)
        size = compressor.payload_bytes(self.blocks)
        payloads = [torch.empty(size, dtype=torch.uint8, device=clock.device) for _ in range(PAYLOADS)]
        for payload in payloads:
            rows.send([self.memory], [payload])
        own = payloads[0]

        def receive(count: int) -> None:
            rows.receive([self.memory], [own], [payloads[:count]], count * [1 / count])

        send = clock.time(lambda: rows.send([self.memory], [own]))
        one, several = clock.time(lambda: receive(1)), clock.time(lambda: receive(PAYLOADS))
        decode = min(one, max(0.0, several - one) / (PAYLOADS - 1))
        return send / self.elements, decode / self.elements, (one - decode) / self.elements
