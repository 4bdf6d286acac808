"""How long work takes on a device, and how many launches it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.pieces import Place

Work = Callable[[], object]


def seconds(place: Place, work: Work, turns: int) -> float:
    """The median of some turns, after one that is not counted; on a GPU between events in its stream."""
    work()
    place.wait()
    if not place.on_gpu:
        return statistics.median(_turn(work) for _ in range(turns))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(turns)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    place.wait()
    return float(statistics.median(begin.elapsed_time(end) for begin, end in events)) / 1e3


def _turn(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def turns(place: Place, work: Work, budget: float = 0.3, most: int = 30) -> int:
    """How many turns there is time for: at least 2."""
    work()
    place.wait()
    start = time.perf_counter()
    work()
    place.wait()
    return max(2, min(most, int(budget / (time.perf_counter() - start))))


def launches(place: Place, work: Work) -> int:
    """What the device is given to do: kernels, copies and fills. On the CPU, the torch operations."""
    work()
    place.wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.on_gpu else [])]
    with profile(activities=activities) as profiler:
        work()
        place.wait()
    events = profiler.events() or []
    if place.on_gpu:
        return sum(event.device_type == DeviceType.CUDA for event in events)
    return sum(event.name.startswith("aten::") for event in events)
