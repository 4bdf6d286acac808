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
from typing import Literal

import torch

from hvd_saef.compression import Blocks, Compression, Compressor
from hvd_saef.settings import Settings

CLOSE = 1.05
"""A method within 5 % of the fastest is as good as it, and the least lossy of those is recommended."""


@dataclass(frozen=True)
class Constants:
    """Seconds that each unit of a feature takes; `wire` is a factor, since its feature is in seconds."""

    wire: float
    """Of the bytes a worker sends over the bandwidth: 1 where the wire is full all the time."""
    byte: float
    """For each byte sent, whatever the bandwidth: what the network costs the processor."""
    message: float
    """For each message that a worker sends one after the other."""
    fixed: float
    """For each step with an exchange, however little it sends."""
    float32: float
    """For each parameter in Horovod's float32 ring allreduce."""
    float16: float
    """For each parameter in its fp16 one."""
    sign_encode: float
    """For each parameter encoded as a sign, by a worker or a server."""
    sign_decode: float
    """For each parameter of each sign payload decoded."""
    topk_encode: float
    """For each parameter that Top-K chooses from, by a worker or a server."""
    topk_decode: float
    """For each entry of each Top-K payload decoded."""
    source: str = ""
    """What they were fitted on."""

    def __post_init__(self) -> None:
        for name in FEATURES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: a number >= 0 is allowed.")

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path | None = None) -> Constants:
        """Those of the file, or those that come with the package.

        Raises ValueError for a file that does not hold them, OSError for one that cannot be read.
        """
        text = (path or resources.files("hvd_saef.planning") / "plan.json").read_text()
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: no constants of the model: {error}") from None


FEATURES = tuple(field.name for field in dataclasses.fields(Constants) if field.name != "source")


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
    wire: Literal["float32", "fp16", "sign", "topk"]
    ratio: float = 1.0
    """Of Top-K."""
    double: bool = True
    """Double-way compression with a sharded server; False is single-way."""
    averaging_period: int | None = None
    node: bool = False
    """Whether a worker is a node: worker="node"."""

    @property
    def dense(self) -> bool:
        """Whether it is Horovod's own."""
        return self.wire in ("float32", "fp16")

    @property
    def compressor(self) -> Compressor:
        """What it compresses with."""
        dense = {"float32": Compression.none, "fp16": Compression.fp16, "sign": Compression.sign}
        return dense.get(self.wire) or Compression.topk(self.ratio)

    @property
    def call(self) -> str:
        """How a user asks for it."""
        if self.dense:
            return "hvd.DistributedOptimizer" + ("(compression=hvd.Compression.fp16)" * (self.wire == "fp16"))
        arguments = [f"compression=hvd_saef.Compression.{self.wire}"]
        arguments[0] += f"({self.ratio:g})" if self.wire == "topk" else ""
        arguments += [] if self.double else ["double_compression=False"]
        arguments += [f"averaging_period={self.averaging_period}"] if self.averaging_period else []
        arguments += ['worker="node"'] if self.node else []
        return f"hvd_saef.DistributedOptimizer({', '.join(arguments)})"

    def payload(self, sizes: Sequence[int]) -> int:
        """Bytes of one worker's update."""
        if self.wire == "sign":
            return sum(-(-size // 8) + 4 for size in sizes)
        if self.dense:
            return sum(sizes) * (4 if self.wire == "float32" else 2)
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
        if (
            self.node and job.ranks > 1
        ):  # the gradients' mean on the node; payloads inside are next to nothing
            found["float32"] += size
            found["wire"] += 8 * 2 * (job.ranks - 1) / job.ranks * 4 * size / job.inside
        if workers == 1:
            return found
        found["byte"] = self.bytes_sent(job.sizes, workers) / (job.ranks if self.node else 1)
        found["wire"] += 8 * self.bytes_between_nodes(job) / job.bandwidth
        found["fixed"] = 1.0
        if self.dense:
            found[self.wire.replace("fp", "float")] += size
            found["message"] = 2 * (workers - 1)
            return found
        decoded = (2 if self.double else workers) * size  # the server's K payloads of 1/K, and the answers
        found[f"{self.wire}_encode"] = size * (1 + self.double / workers)
        found[f"{self.wire}_decode"] = decoded * (self.ratio if self.wire == "topk" else 1)
        buckets = math.ceil(4 * size / Settings.bucket_bytes)
        found["message"] = buckets * (workers - 1) * (1 + self.double) + 2 * math.ceil(math.log2(workers))
        if self.averaging_period:
            found["float32"] += size / self.averaging_period
            found["message"] += 2 * (workers - 1) / self.averaging_period
        return found


def seconds(features: Mapping[str, float], constants: Constants) -> float:
    """What the features take by the model."""
    return float(sum(number * getattr(constants, name) for name, number in features.items()))


def predict(method: Method, job: Job, constants: Constants) -> float:
    """Seconds of a step, by the model."""
    return job.compute + seconds(method.features(job), constants)


def _with_averaging(method: Method, period: int = 16) -> Method:
    return dataclasses.replace(method, name=f"{method.name}, p = {period}", averaging_period=period)


UNCOMPRESSED = Method("Horovod float32", "float32")
_SIGN, _SINGLE = Method("sign DC", "sign"), Method("sign SC", "sign", double=False)
_TOPK, _TOPK_SMALL = Method("Top-K 1 %", "topk", 0.01), Method("Top-K 0.1 %", "topk", 0.001)
METHODS = (
    UNCOMPRESSED,
    Method("Horovod fp16", "fp16"),
    *(_with_averaging(_SINGLE), _SINGLE, _with_averaging(_SIGN), _with_averaging(_SIGN, 64), _SIGN),
    *(_with_averaging(_TOPK), _with_averaging(_TOPK, 64), _TOPK),
    *(_with_averaging(_TOPK_SMALL), _with_averaging(_TOPK_SMALL, 64), _TOPK_SMALL),
)
"""From the least lossy to the most."""


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
