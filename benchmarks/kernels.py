"""Times the kernels against `tensor.copy_` of the same size, their twins in plain torch, and `torch.topk`.

    python benchmarks/kernels.py                                    # about two minutes
    python benchmarks/kernels.py --layouts 1e6 1e7 1e8 --threads 1 2 4

Each kernel takes turns with copy_, and is compared with the turn beside it, so that what else runs on the
machine meets both. Writes kernels.csv, kernels.txt and kernels.png.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.models import SHAPES
from benchmarks.pictures import save
from hvd_saef import Compressor, kernels
from hvd_saef.compression import BUILT_IN, BlockedTensor, Blocks, Fused, Memory
from hvd_saef.memory.algorithm import PlainRows

WORKERS = 4
CPU = torch.device("cpu")


def fused(compressor: Compressor, device: torch.device) -> Fused | None:
    """The compressor's kernels for float32 on a device."""
    return compressor.fused(device, torch.float32, True)


def compressors(device: torch.device) -> dict[str, Compressor]:
    """Of each kind of compressor that has kernels for the device the first setting, by its title."""
    kinds = (
        [one for one in compressor.considered() if one.double_compression and fused(one.compressor, device)]
        for compressor in BUILT_IN
    )
    return {found[0].title: found[0].compressor for found in kinds if found}


Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One kernel on one layout. Times are medians, in seconds; NaN where there is nothing to time."""

    layout: str
    elements: int
    threads: int
    kernel: str
    seconds: float
    copies: float
    """The median of its times over copy_'s in the same turn."""
    twin_seconds: float

    def __str__(self) -> str:
        text = f"{self.kernel:<20}{1e3 * self.seconds:>9.2f}{self.copies:>9.2f}"
        if not math.isnan(self.twin_seconds):
            text += f"{1e3 * self.twin_seconds:>11.2f}{self.twin_seconds / self.seconds:>9.1f}"
        return text


HEADER = f"{'':<20}{'ms':>9}{'copies':>9}{'twin ms':>11}{'faster':>9}"


class Bench:
    """The memory of one bucket on a device, and what is timed on it. `points` is the parameters' dtype."""

    def __init__(
        self, sizes: Sequence[int], device: torch.device, points: torch.dtype = torch.float32
    ) -> None:
        self.device = device
        generator = torch.Generator(device).manual_seed(0)
        self.blocks = Blocks.cut(list(sizes), None, torch.float32)

        def numbers() -> Tensor:
            return torch.randn(self.blocks.numel, generator=generator, device=device)

        self.x, self.e, self.s = numbers(), numbers(), numbers()
        parameters = [piece.to(points, copy=True) for piece in numbers().split(list(sizes))]
        self.memory = Memory(self.blocks, self.x, self.e, None, parameters, alpha=1.0, beta=0.0)
        self.copied = torch.empty_like(self.x)

    def copy(self) -> None:
        """What everything is measured by."""
        self.copied.copy_(self.x)

    def works(self) -> Iterator[tuple[str, Work, Work | None]]:
        """What is timed: its name, with kernels, and on the twins."""
        for name, compressor in compressors(self.device).items():
            rows = fused(compressor, self.device)
            assert rows is not None
            pairs = zip(
                self.rows(compressor, rows), self.rows(compressor, PlainRows(compressor)), strict=True
            )
            for (row, kernel), (_, twin) in pairs:
                yield f"{name} {row}", kernel, twin
        look = partial(kernels.squares_fit, self.memory.parameter_memory)
        yield "look at numbers", look, look
        yield "torch.topk of 1 %", self.topk(), None

    def topk(self) -> Work:
        """What others take for Top-K of 1 %."""
        kept = math.ceil(0.01 * self.blocks.numel)
        return partial(torch.topk, self.x.abs(), kept, sorted=False)

    def rows(self, compressor: Compressor, rows: Fused) -> Iterator[tuple[str, Work]]:
        """The rows of Algorithm 1 around the compressor, with payloads of WORKERS."""
        size = compressor.payload_bytes(self.blocks)
        payloads = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(WORKERS)]
        for payload in payloads:
            delta = BlockedTensor(torch.randn(self.blocks.numel, device=self.device), self.blocks)
            compressor.encode(delta, payload)
        weights = WORKERS * [1 / WORKERS]
        sent, served = torch.empty_like(payloads[0]), BlockedTensor(self.s, self.blocks)
        yield "send", partial(rows.send, [self.memory], [sent])
        yield "serve", partial(rows.serve, payloads, weights, served, torch.empty_like(sent))
        yield "receive", partial(rows.receive, [self.memory], [sent], [payloads], weights)


def seconds(work: Work) -> float:
    """Of one turn."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(layout: str, sizes: Sequence[int], threads: int, turns: int, twin_turns: int) -> Iterator[Row]:
    """All kernels on one layout."""
    torch.set_num_threads(threads)
    bench = Bench(sizes, CPU)
    copies = [seconds(bench.copy) for _ in range(turns + 1)][1:]
    yield Row(layout, bench.blocks.numel, threads, "copy_", statistics.median(copies), 1.0, math.nan)
    for name, kernel, twin in bench.works():
        kernel()
        pairs = [(seconds(kernel), seconds(bench.copy)) for _ in range(turns)]
        slow = math.nan
        if twin is not None:
            with kernels.only("twins"):
                slow = seconds(twin)
                slow = statistics.median(seconds(twin) for _ in range(turns if slow < 0.01 else twin_turns))
        ratio = statistics.median(mine / copied for mine, copied in pairs)
        median = statistics.median(mine for mine, _ in pairs)
        yield Row(layout, bench.blocks.numel, threads, name, median, ratio, slow)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars: how many copies of the same memory each kernel takes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row.layout, row.threads) for row in rows))
    names = list(dict.fromkeys(row.kernel for row in rows if not math.isnan(row.twin_seconds)))
    figure, axes = pyplot.subplots(figsize=(11, 4))
    for i, group in enumerate(groups):
        heights = {row.kernel: row.copies for row in rows if (row.layout, row.threads) == group}
        places = [j + (i - (len(groups) - 1) / 2) * 0.8 / len(groups) for j in range(len(names))]
        label = f"{group[0]}, {group[1]} thread{'s' * (group[1] > 1)}"
        axes.bar(places, [heights[name] for name in names], 0.8 / len(groups), label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="time of copy_s of the same size")
    axes.set_xticks(range(len(names)), names)
    axes.legend()
    figure.tight_layout()
    save(figure, path)


def layout_of(name: str) -> tuple[str, list[int]]:
    """A model's parameters, or one tensor of so many elements."""
    if name in SHAPES:
        return name, [math.prod(shape) for shape in SHAPES[name]()]
    try:
        elements = int(float(name))
    except ValueError:
        elements = 0
    if elements < 1:
        raise argparse.ArgumentTypeError(f"{name!r}: a number of elements or one of {', '.join(SHAPES)}")
    return f"{elements / 1e6:g} M", [elements]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [layout_of(name) for name in ("1e6", "25.6e6", "resnet50")]
    parser.add_argument("--layouts", nargs="+", type=layout_of, default=default, metavar="ELEMENTS|MODEL")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--turns", type=int, default=15, help="of each kernel (default 15)")
    parser.add_argument("--twin-turns", type=int, default=1, help="of each twin (default 1)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kernels")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    compiled = kernels.load("compiled")
    if isinstance(compiled, str):
        sys.exit(f"The kernels do not load ({compiled}): make setup")
    rows: list[Row] = []
    lines = [f"kernels: {compiled.describe()}"]
    print(lines[0])
    for layout, sizes in options.layouts:
        for threads in options.threads:
            title = f"{layout}, {len(sizes)} tensors, {sum(sizes) / 1e6:.1f} M float32, threads: {threads}"
            lines += ["", title, HEADER]
            print(f"\n{title}\n{HEADER}", flush=True)
            for row in measure(layout, sizes, threads, options.turns, options.twin_turns):
                rows.append(row)
                lines.append(str(row))
                print(row, flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "kernels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
    (options.out / "kernels.txt").write_text("\n".join(lines) + "\n")
    plot(rows, options.out / "kernels.png")
    print(f"\nWritten: {options.out}/kernels.csv, kernels.txt, kernels.png")


if __name__ == "__main__":
    main()
