"""Each kernel beside a device copy of as many bytes, its twin and torch.topk; how many launches they are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from benchmarks.gpu.clock import Work, launches, seconds, turns
from benchmarks.gpu.peer import OneBit
from benchmarks.gpu.pieces import Place, Row
from benchmarks.kernels import WORKERS, Bench, compressors, fused
from benchmarks.models import SHAPES
from hvd_saef import Compressor, kernels
from hvd_saef.compression import SignCompressor
from hvd_saef.memory.algorithm import PlainRows

LAYOUTS = ("resnet50", "transformer")
TINY = ("tiny",)


def passes(compressor: Compressor, row: str, point: int) -> float:
    """The bytes an element that one pass over memory must move, but for payloads; a parameter has `point`."""
    settles = isinstance(compressor, SignCompressor)
    return {"send": 12 + point, "serve": 8, "receive": (16 if settles else 8) + point}[row]


def payloads(row: str) -> int:
    """How many payloads a row reads and writes."""
    return {"send": 1, "serve": WORKERS + 1, "receive": WORKERS}[row]


class Copies:
    """What a copy on the device takes, for as many bytes as something else moves."""

    def __init__(self, place: Place, numel: int) -> None:
        source, target = (torch.ones(numel, device=place.device) for _ in range(2))
        work: Work = lambda: target.copy_(source)  # noqa: E731
        self.seconds = seconds(place, work, turns(place, work))
        self.rate = 8 * numel / self.seconds

    def of(self, moved: float, taken: float) -> float:
        """How many copies of as many bytes this time is."""
        return taken * self.rate / moved


def row_of(layout: str, name: str, taken: float, moved: float, copies: Copies) -> Row:
    """One thing that was timed."""
    return {
        "layout": layout,
        "name": name,
        "ms": 1e3 * taken,
        "GB/s": moved / taken / 1e9,
        "copies": copies.of(moved, taken),
    }


def sizes_of(layout: str, place: Place) -> list[int]:
    """The sizes of a model's tensors."""
    sizes = [math.prod(shape) for shape in SHAPES[layout]()]
    return [max(1, size // 50) for size in sizes] if place.tiny else sizes


def work(place: Place) -> Iterator[Row]:
    """All kernels on all layouts."""
    version = kernels.version_for(place.device, torch.float32)
    if not version.FUSES:
        why = kernels.load("on_triton")
        yield {
            "layout": "",
            "name": "kernels",
            "skipped": f"Triton: {why if isinstance(why, str) else 'off'}",
        }
    for layout, point in itertools.product(TINY if place.tiny else LAYOUTS, (torch.float32, torch.bfloat16)):
        sizes = sizes_of(layout, place)
        copies = Copies(place, sum(sizes))
        name = f"{layout}, {str(point).removeprefix('torch.')}"
        yield row_of(name, "copy_", copies.seconds, 8 * sum(sizes), copies) | {"version": version.describe()}
        if point is torch.float32 or (version.FUSES and version.NARROW_POINTS):
            yield from _kernels(place, name, Bench(sizes, place.device, point), copies)


def _kernels(place: Place, layout: str, bench: Bench, copies: Copies) -> Iterator[Row]:
    numel, wide = bench.blocks.numel, bench.memory.parameter_memory[0].dtype is torch.float32
    point = bench.memory.parameter_memory[0].element_size()
    for title, compressor in compressors(place.device).items():
        rows = fused(compressor, place.device)
        assert rows is not None
        size = compressor.payload_bytes(bench.blocks)
        for row, kernel in bench.rows(compressor, rows):
            moved = passes(compressor, row, point) * numel + payloads(row) * size
            taken = seconds(place, kernel, turns(place, kernel))
            yield row_of(layout, f"{title} {row}", taken, moved, copies)
        if wide and layout.startswith(("resnet50", "tiny")):
            with kernels.only("twins"):
                for row, twin in bench.rows(compressor, PlainRows(compressor)):
                    taken = seconds(place, twin, turns(place, twin, most=5))
                    moved = passes(compressor, row, point) * numel + payloads(row) * size
                    yield row_of(layout, f"{title} {row}, twin", taken, moved, copies)
    if wide:
        look: Work = lambda: kernels.squares_fit(bench.memory.parameter_memory)  # noqa: E731
        yield row_of(layout, "look at numbers", seconds(place, look, turns(place, look)), 4 * numel, copies)
        topk = bench.topk()
        yield row_of(layout, "torch.topk of 1 %", seconds(place, topk, turns(place, topk)), 4 * numel, copies)


def peer(place: Place) -> Iterator[Row]:
    """DeepSpeed's chain of operations for the same job, in passes of ours for sign."""
    numel = sum(sizes_of(TINY[0] if place.tiny else LAYOUTS[0], place))
    copies, chain = Copies(place, numel), OneBit(numel, WORKERS, place.device)
    floors = {"send": 16, "serve": 8 / WORKERS, "receive": 20}
    for name, work in chain.works():
        taken = seconds(place, work, turns(place, work))
        moved = numel * floors.get(name.split()[-1], 1 + 1 / 8)
        yield row_of("as resnet50", name, taken, moved, copies) | {"launches": launches(place, work)}


def counted(place: Place) -> Iterator[Row]:
    """The launches of a bucket and step, with all of ResNet-50's 161 tensors in it."""
    sizes = sizes_of("tiny" if place.tiny else "resnet50", place)
    bench = Bench(sizes, place.device)
    for title, compressor in compressors(place.device).items():
        rows = fused(compressor, place.device)
        assert rows is not None
        counts = {row: launches(place, kernel) for row, kernel in bench.rows(compressor, rows)}
        yield {"name": title, "tensors": len(sizes), **counts, "launches": sum(counts.values())}
