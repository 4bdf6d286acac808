"""A model of a step's time, by method: what `hvd-saef plan` answers from. No workers, no MPI.

The model is linear: a step's time is the compute, plus for each feature of a method (bytes over the
bandwidth, messages, parameters that are encoded, payloads that are decoded) its number times a constant.
The constants are fitted on measured steps by `benchmarks/scaling.py`, which also shows how far off the
model is on those it was not fitted on. Of other machines, networks and numbers of workers it gives a
prediction, not a measurement.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from hvd_saef.compression import BUILT_IN, Blocks, Compressor, Considered, DenseCompressor
from hvd_saef.settings import Settings

CLOSE = 1.05
"""A method within 5 % of the fastest is as good as it, and the least lossy of those is recommended."""


GENERAL = ("wire", "byte", "message", "fixed")
"""The features that every method has:

- wire: of the bytes a worker sends over the bandwidth; 1 where the wire is full all the time;
- byte: for each byte sent, whatever the bandwidth: what the network costs the processor;
- message: for each message that a worker sends one after the other;
- fixed: for each step with an exchange, however little it sends.
"""
FEATURES = (*GENERAL, *(cost for compressor in BUILT_IN for cost in compressor.costs))
"""The features of a step's time: the general ones, and what each compressor says that its work costs."""


@dataclass(frozen=True)
class Constants:
    """Seconds that each unit of a feature takes; `wire` is a factor, since its feature is in seconds.

    Raises ValueError for a feature that is missing, unknown or no number >= 0.
    """

    seconds: Mapping[str, float]
    """By feature."""
    source: str = ""
    """What the constants were fitted on."""

    def __post_init__(self) -> None:
        for name in (*self.seconds, *FEATURES):  # what is unknown says more than what is missing
            value = self.seconds.get(name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name not in FEATURES or not number or not 0 <= float(value or 0) < math.inf:
                raise ValueError(
                    f"{name}={value!r}: a number >= 0 is allowed, for each of {', '.join(FEATURES)}."
                )

    def save(self, path: Path) -> None:
        """Write the constants as JSON."""
        path.write_text(json.dumps({**self.seconds, "source": self.source}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | None = None) -> Constants:
        """The constants in the file, or those that come with the package.

        Raises ValueError for a file that does not hold them, OSError for one that cannot be read.
        """
        text = (path or resources.files("hvd_saef.planning") / "plan.json").read_text()
        try:
            found = dict(json.loads(text))
            return cls(source=str(found.pop("source", "")), seconds=found)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: no constants of the model: {error}") from None


@dataclass(frozen=True)
class Job:
    """What is to be trained, and on what."""

    sizes: Sequence[int]
    """Elements of each parameter tensor."""
    workers: int
    """Ranks that exchange."""
    bandwidth: float
    """Bits a second that a node can send; infinity where only processors limit."""
    compute: float
    """Seconds of a step without any exchange."""
    ranks: int = 1
    """On each node: they share its bandwidth."""
    inside: float = math.inf
    """Bits a second that a rank can send to the others of its node."""

    def __post_init__(self) -> None:
        if self.workers % self.ranks:
            raise ValueError(
                f"ranks={self.ranks} on each node: a divisor of workers={self.workers} is allowed."
            )

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Method:
    """A way to exchange: Horovod's ring allreduce, or one of this library's."""

    name: str
    compressor: Compressor
    double: bool = True
    """Double-way compression with a sharded server; False is single-way."""
    averaging_period: int | None = None
    node: bool = False
    """Whether a worker is a node: worker="node"."""

    @property
    def dense(self) -> bool:
        """Whether Horovod's allreduce carries the method's numbers."""
        return isinstance(self.compressor, DenseCompressor)

    @property
    def call(self) -> str:
        """How a user asks for the method."""
        arguments = [f"compression={self.compressor.call}"]
        if self.dense:  # Horovod's own arithmetic
            arguments += ['feedback="none"']
        arguments += [] if self.double else ["double_compression=False"]
        arguments += [f"averaging_period={self.averaging_period}"] if self.averaging_period else []
        arguments += ['worker="node"'] if self.node else []
        return f"hvd_saef.DistributedOptimizer({', '.join(arguments)})"

    def payload(self, sizes: Sequence[int]) -> int:
        """Bytes of one worker's update."""
        return self.compressor.payload_bytes(Blocks.cut(list(sizes), None, torch.float32))

    def bytes_sent(self, sizes: Sequence[int], workers: int) -> float:
        """Bytes that a worker sends a step, the mean over workers and steps, without protocol overhead."""
        return self._sent(sizes, workers) + self._averaged(sizes, workers)

    def _sent(self, sizes: Sequence[int], workers: int) -> float:
        if self.dense or self.double:
            return 2 * (workers - 1) / workers * self.payload(sizes)
        return (workers - 1) * self.payload(sizes)

    def _averaged(self, sizes: Sequence[int], workers: int) -> float:
        period = self.averaging_period
        return 2 * (workers - 1) / workers * 4 * sum(sizes) / period if period else 0.0

    def bytes_between_nodes(self, job: Job) -> float:
        """Bytes that a node sends to others a step. A ring enters and leaves a node once."""
        nodes = job.workers // job.ranks
        if self.node:
            return self.bytes_sent(job.sizes, nodes)
        if nodes == 1:
            return 0.0
        if self.dense:
            return self.bytes_sent(job.sizes, job.workers)
        outside = job.ranks * (job.workers - job.ranks) / (job.workers - 1)
        return self._sent(job.sizes, job.workers) * outside + self._averaged(job.sizes, job.workers)

    def features(self, job: Job) -> dict[str, float]:
        """How much of what each constant stands for is in a step."""
        workers, size = job.workers // (job.ranks if self.node else 1), job.parameters
        found = dict.fromkeys(FEATURES, 0.0)

        def add(work: Mapping[str, float]) -> None:
            for name, units in work.items():
                found[name] += units

        if (
            self.node and job.ranks > 1
        ):  # the gradients' mean on the node; payloads inside are next to nothing
            add(MEAN.work(size, 0))
            found["wire"] += 8 * 2 * (job.ranks - 1) / job.ranks * 4 * size / job.inside
        if workers == 1:
            return found
        found["byte"] = self.bytes_sent(job.sizes, workers) / (job.ranks if self.node else 1)
        found["wire"] += 8 * self.bytes_between_nodes(job) / job.bandwidth
        found["fixed"] = 1.0
        if self.dense:
            add(self.compressor.work(size, 0))
            found["message"] = 2 * (workers - 1)
            return found
        # A server of 1/K of the model decodes K payloads, and each worker its answers; or all K payloads.
        add(self.compressor.work(size * (1 + self.double / workers), (2 if self.double else workers) * size))
        buckets = math.ceil(4 * size / Settings.bucket_bytes)
        found["message"] = buckets * (workers - 1) * (1 + self.double) + 2 * math.ceil(math.log2(workers))
        if self.averaging_period:
            add(MEAN.work(size / self.averaging_period, 0))
            found["message"] += 2 * (workers - 1) / self.averaging_period
        return found


def seconds(features: Mapping[str, float], constants: Constants) -> float:
    """What the features take by the model."""
    return float(sum(number * constants.seconds[name] for name, number in features.items()))


def predict(method: Method, job: Job, constants: Constants) -> float:
    """Seconds of a step, by the model."""
    return job.compute + seconds(method.features(job), constants)


def _methods(considered: Considered) -> list[Method]:
    """One setting of a compressor, with each averaging period that is considered and without."""
    plain = Method(considered.title, considered.compressor, considered.double_compression)
    return [
        *(
            dataclasses.replace(plain, name=f"{plain.name}, p = {period}", averaging_period=period)
            for period in considered.averaging_periods
        ),
        plain,
    ]


METHODS = tuple(
    method
    for compressor in BUILT_IN
    for considered in compressor.considered()
    for method in _methods(considered)
)
"""All methods, from the least lossy to the most."""
UNCOMPRESSED = METHODS[0]
MEAN = UNCOMPRESSED.compressor
"""What carries means: of gradients on a node, and of errors."""


def methods(job: Job) -> list[Method]:
    """From the least lossy to the most: with several ranks a node, the node as a worker before each."""
    if job.ranks == 1:
        return list(METHODS)
    pairs = [
        [method]
        if method.dense
        else [dataclasses.replace(method, name=f"{method.name}, node", node=True), method]
        for method in METHODS
    ]
    return [method for pair in pairs for method in pair]


def recommend(job: Job, constants: Constants) -> Method:
    """The least lossy method whose predicted step is within 5 % of the fastest."""
    times = {method: predict(method, job, constants) for method in methods(job)}
    return next(method for method in times if times[method] <= CLOSE * min(times.values()))
