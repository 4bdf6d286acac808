"""A model of a step's time, by method, from which `hvd-saef plan` answers. Local; it needs no MPI.

The model is linear: a step's time is the time of the compute, plus a term for each feature of the method
(bytes over the bandwidth, messages, encoded parameters, decoded payloads). A term is the feature's number
times a constant. `benchmarks/scaling.py` fits the constants on measured steps, and shows the model's errors
on steps that the fit did not use. For other machines, networks and numbers of workers the model gives a
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
"""Methods within 5 % of the fastest count as equally fast; the least lossy of them is recommended."""


GENERAL = ("wire", "byte", "message", "fixed")
"""The features that every method has:

- wire: the seconds that the sent bytes take at the bandwidth; the constant is 1 if the wire is always full;
- byte: the bytes sent; the constant is the processor's time for each, whatever the bandwidth;
- message: the messages that a worker sends one after the other;
- fixed: 1 for a step with an exchange, however little is sent.
"""
FEATURES = (*GENERAL, *(cost for compressor in BUILT_IN for cost in compressor.costs))
"""The features of a step's time: the general ones, and the `costs` of each compressor."""


@dataclass(frozen=True)
class Constants:
    """The seconds that one unit of each feature takes; `wire` is a factor, since its feature is in seconds.

    Raises ValueError if a feature is missing or unknown, or its constant is not a number >= 0.
    """

    seconds: Mapping[str, float]
    """The seconds, by feature."""
    source: str = ""
    """The measurements on which the constants were fitted, in words."""

    def __post_init__(self) -> None:
        for name in (*self.seconds, *FEATURES):  # an unknown name tells more than a missing one
            value = self.seconds.get(name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name not in FEATURES or not number or not 0 <= float(value or 0) < math.inf:
                raise ValueError(
                    f"{name}={value!r}: a number >= 0 is allowed, for each of {', '.join(FEATURES)}."
                )

    def save(self, path: Path) -> None:
        """Writes the constants to `path` as JSON."""
        path.write_text(json.dumps({**self.seconds, "source": self.source}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | None = None) -> Constants:
        """Returns the constants in the file `path`; without a path, those that come with the package.

        Raises ValueError if the file does not hold constants, OSError if it cannot be read.
        """
        file = path or resources.files("hvd_saef.planning") / "plan.json"
        text = file.read_text()
        try:
            found = dict(json.loads(text))
            return cls(source=str(found.pop("source", "")), seconds=found)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: no constants of the model: {error}") from None


@dataclass(frozen=True)
class Job:
    """A training job: the model's sizes, the machines and the network."""

    sizes: Sequence[int]
    """The number of elements of each parameter tensor."""
    workers: int
    """The number of ranks that exchange."""
    bandwidth: float
    """The bits a second that a node can send; infinity if only the processors limit the speed."""
    compute: float
    """The seconds of a step without any exchange."""
    ranks: int = 1
    """The number of ranks on each node, which share the node's bandwidth."""
    inside: float = math.inf
    """The bits a second that a rank can send to the other ranks of its node."""

    def __post_init__(self) -> None:
        if self.workers % self.ranks:
            raise ValueError(
                f"ranks={self.ranks} on each node: a divisor of workers={self.workers} is allowed."
            )

    @property
    def parameters(self) -> int:
        """The number of elements of all parameters."""
        return sum(self.sizes)


@dataclass(frozen=True)
class Method:
    """A way to exchange updates: Horovod's ring allreduce, or a method of this library."""

    name: str
    compressor: Compressor
    double: bool = True
    """True for double-way compression with a sharded server, False for single-way compression."""
    averaging_period: int | None = None
    node: bool = False
    """True if each node is one worker: worker="node"."""

    @property
    def dense(self) -> bool:
        """True if the method sends its numbers by Horovod's allreduce."""
        return isinstance(self.compressor, DenseCompressor)

    @property
    def call(self) -> str:
        """The call by which a user asks for the method."""
        arguments = [f"compression={self.compressor.call}"]
        if self.dense:  # feedback "none" gives Horovod's own arithmetic
            arguments += ['feedback="none"']
        arguments += [] if self.double else ["double_compression=False"]
        arguments += [f"averaging_period={self.averaging_period}"] if self.averaging_period else []
        arguments += ['worker="node"'] if self.node else []
        return f"hvd_saef.DistributedOptimizer({', '.join(arguments)})"

    def payload(self, sizes: Sequence[int]) -> int:
        """Returns the bytes of one worker's payload for tensors of `sizes` elements."""
        return self.compressor.payload_bytes(Blocks.cut(list(sizes), None, torch.float32))

    def bytes_sent(self, sizes: Sequence[int], workers: int) -> float:
        """Returns the bytes that a worker sends in a step, without protocol overhead.

        They are the mean over workers and steps.
        """
        return self._sent(sizes, workers) + self._averaged(sizes, workers)

    def _sent(self, sizes: Sequence[int], workers: int) -> float:
        if self.dense or self.double:
            return 2 * (workers - 1) / workers * self.payload(sizes)
        return (workers - 1) * self.payload(sizes)

    def _averaged(self, sizes: Sequence[int], workers: int) -> float:
        period = self.averaging_period
        return 2 * (workers - 1) / workers * 4 * sum(sizes) / period if period else 0.0

    def bytes_between_nodes(self, job: Job) -> float:
        """Returns the bytes that a node sends to others in a step. A ring enters and leaves a node once."""
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
        """Returns the number of units of each feature in a step."""
        workers, size = job.workers // (job.ranks if self.node else 1), job.parameters
        found = dict.fromkeys(FEATURES, 0.0)

        def add(work: Mapping[str, float]) -> None:
            for name, units in work.items():
                found[name] += units

        if (
            self.node and job.ranks > 1
        ):  # the node averages gradients; payloads inside it cost next to nothing
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
        # DC: a server decodes K payloads of 1/K of the model, and each worker all answers.
        # SC: each worker decodes K whole payloads.
        add(self.compressor.work(size * (1 + self.double / workers), (2 if self.double else workers) * size))
        buckets = math.ceil(4 * size / Settings.bucket_bytes)
        found["message"] = buckets * (workers - 1) * (1 + self.double) + 2 * math.ceil(math.log2(workers))
        if self.averaging_period:
            add(MEAN.work(size / self.averaging_period, 0))
            found["message"] += 2 * (workers - 1) / self.averaging_period
        return found


def seconds(features: Mapping[str, float], constants: Constants) -> float:
    """Returns the seconds that the features take, by the model."""
    return float(sum(number * constants.seconds[name] for name, number in features.items()))


def predict(method: Method, job: Job, constants: Constants) -> float:
    """Returns the seconds of a step, by the model."""
    return job.compute + seconds(method.features(job), constants)


def _methods(considered: Considered) -> list[Method]:
    """Returns the methods of one setting: with each of its averaging periods, and without averaging."""
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
"""The compressor of the allreduces that average the gradients on a node, and the errors."""


def methods(job: Job) -> list[Method]:
    """Returns the methods for `job`, from the least lossy to the most.

    With several ranks on a node, each method comes first with nodes as workers, then with ranks as workers.
    """
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
    """Returns the least lossy method whose predicted step is within 5 % of the fastest."""
    times = {method: predict(method, job, constants) for method in methods(job)}
    return next(method for method in times if times[method] <= CLOSE * min(times.values()))
