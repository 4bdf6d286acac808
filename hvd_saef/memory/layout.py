"""Parameters → blocks → buckets, and the parts into which a sharded server cuts a bucket. Local."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hvd_saef.compression import Blocks, Compression, Compressor, state_dtype
from hvd_saef.kernels import is_gapless as is_gapless
from hvd_saef.settings import Settings

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAST_TO_LEAVE = 8
"""How many times smaller the first bucket is: backward completes it last, and nothing hides its trip."""
ChooseCompressor = Callable[[str, Tensor], Compressor]
Entry = tuple[str, Tensor, Compressor]
"""A parameter with its name and what compresses it."""


def _form(parameter: Tensor) -> tuple[Any, ...]:
    return parameter.dtype, parameter.device, tuple(parameter.shape), parameter.stride()


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in its bucket's flat memory."""

    name: str
    parameter: Tensor
    start: int
    form: tuple[Any, ...] = field(init=False)
    """What the parameter was like when it was laid out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "form", _form(self.parameter))

    def change(self) -> str | None:
        """What has changed since then, in words."""
        now = _form(self.parameter)
        if now == self.form:
            return None
        what = ("dtype", "device", "shape", "strides")
        i = next(i for i in range(len(what)) if now[i] != self.form[i])
        return f"changed its {what[i]} from {self.form[i]} to {now[i]}"

    @property
    def stop(self) -> int:
        """The element after the parameter's last."""
        return self.start + self.parameter.numel()

    def view(self, flat: Tensor) -> Tensor:
        """The parameter's place in `flat`, in the parameter's shape: a view.

        The elements are taken in the parameter's memory order where that is dense (channels_last
        too), so that copies run straight through memory, else in logical order.
        """
        part = flat[self.start : self.stop]
        if is_gapless(self.parameter):
            return part.as_strided(
                self.parameter.shape, self.parameter.stride(), storage_offset=part.storage_offset()
            )
        return part.view(self.parameter.shape)


@dataclass(frozen=True)
class Part:
    """Whole blocks of a bucket from element `start` to `stop`: what one server of a sharded DC serves."""

    start: int
    stop: int
    blocks: Blocks


@dataclass(frozen=True)
class Bucket:
    """Parameters of one compressor, dtype and device, end to end in one flat memory."""

    index: int
    slots: tuple[Slot, ...]
    compressor: Compressor
    blocks: Blocks
    device: torch.device

    @property
    def numel(self) -> int:
        """Elements of all its parameters."""
        return self.blocks.numel

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of x, e and s: float32 or wider."""
        return self.blocks.dtype

    @property
    def dense(self) -> bool:
        """Whether its payloads are averaged by Horovod's allreduce."""
        return self.compressor.wire_dtype(self.dtype) is not None

    @cached_property
    def parameters(self) -> list[Tensor]:
        """Its parameters, in order."""
        return [slot.parameter for slot in self.slots]

    def new_flat(self) -> Tensor:
        """Flat memory for the bucket, [numel], zeros."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """`flat` ([numel]) cut into views of the parameters' shapes."""
        return [slot.view(flat) for slot in self.slots]

    def parts(self, number: int) -> list[Part]:
        """The bucket cut at block boundaries into `number` parts, as even as its blocks allow."""
        cuts = [self.blocks.nearest_boundary(j * self.numel // number) for j in range(number)] + [self.numel]
        return [
            Part(start, stop, self.blocks.between(start, stop)) for start, stop in itertools.pairwise(cuts)
        ]


@dataclass(frozen=True)
class Layout:
    """All buckets of an optimizer, and what the workers must agree on."""

    buckets: tuple[Bucket, ...]
    description: dict[str, Any]
    frozen: tuple[Entry, ...] = ()
    """The optimizer's other parameters, which are left alone until they take part."""

    @cached_property
    def digest(self) -> str:
        """A hash of the description."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    @cached_property
    def slots(self) -> list[Slot]:
        """All slots, bucket by bucket."""
        return [slot for bucket in self.buckets for slot in bucket.slots]

    @property
    def dense(self) -> bool:
        """Whether nothing travels as a payload, nor will once frozen parameters train."""
        later = ((compressor, state_dtype(parameter.dtype)) for _, parameter, compressor in self.frozen)
        return all(bucket.dense for bucket in self.buckets) and all(
            compressor.wire_dtype(dtype) is not None for compressor, dtype in later
        )

    def largest_share(self) -> tuple[float, str]:
        """The largest block of compressed payloads, as a fraction of all of them, and its parameter."""
        compressed = [bucket for bucket in self.buckets if not bucket.dense and bucket.numel]
        if not compressed:
            return 0.0, ""
        bucket = max(compressed, key=lambda b: b.blocks.largest)
        run = max(bucket.blocks.runs, key=lambda r: r.size)
        name = next(slot.name for slot in bucket.slots if slot.start <= run.start < slot.stop)
        return run.size / sum(b.numel for b in compressed), name


def build_layout(
    param_groups: Sequence[Mapping[str, Any]],
    names: Mapping[Tensor, str],
    choose: ChooseCompressor,
    settings: Settings,
    earlier: Layout | None = None,
) -> Layout:
    """Lay out the parameters of `param_groups` that take part, in their order.

    With an `earlier` layout of some of them, its buckets stay, and new ones follow.
    Raises TypeError for a parameter that is not of a real floating dtype, ValueError for an expanded one.
    """
    laid_out = {slot.parameter for slot in earlier.slots} if earlier else set()
    open_buckets: dict[tuple[torch.dtype, torch.device, str], list[Entry]] = {}
    full: list[list[Entry]] = []
    frozen: list[Entry] = []
    parameters: list[dict[str, Any]] = []
    for number, group in enumerate(param_groups):
        for parameter in group["params"]:
            if parameter in laid_out:
                continue
            name = names[parameter]
            if not takes_part(parameter):
                known = parameter.dtype in DTYPES  # a table of integers, say, is nothing to compress
                frozen.append((name, parameter, choose(name, parameter) if known else Compression.none))
                continue
            if parameter.dtype not in DTYPES:
                raise TypeError(
                    f"parameter {name!r} is of dtype {parameter.dtype}: float16, bfloat16, float32 and "
                    "float64 are allowed. Leave it out of the optimizer."
                )
            if parameter.numel() and any(
                stride == 0 and size > 1
                for stride, size in zip(parameter.stride(), parameter.shape, strict=True)
            ):
                raise ValueError(
                    f"parameter {name!r} of shape {tuple(parameter.shape)} is expanded (strides "
                    f"{parameter.stride()}): several of its elements are one number in memory. clone() it "
                    "before it becomes a parameter."
                )
            compressor = choose(name, parameter)
            dtype = state_dtype(parameter.dtype)
            key = (dtype, parameter.device, compressor.description)
            entries = open_buckets.setdefault(key, [])
            most = settings.bucket_bytes if full or earlier else settings.bucket_bytes // LAST_TO_LEAVE
            if entries and _bytes(entries, dtype) + parameter.numel() * dtype.itemsize > most:
                full.append(entries)
                entries = open_buckets[key] = []
            entries.append((name, parameter, compressor))
            parameters.append(
                {
                    "name": name,
                    "shape": list(parameter.shape),
                    "strides": list(parameter.stride()),
                    "dtype": str(parameter.dtype),
                    "group": number,
                    "compression": compressor.description,
                }
            )
    full += open_buckets.values()
    before = earlier.buckets if earlier else ()
    buckets = tuple(_bucket(len(before) + i, entries, settings.block_size) for i, entries in enumerate(full))
    description = {
        "settings": settings.describe(),
        "parameters": (earlier.description["parameters"] if earlier else []) + parameters,
        "frozen": [name for name, _, _ in frozen],
    }
    return Layout(before + buckets, description, tuple(frozen))


def averages_gradients(settings: Settings, layout: Layout) -> bool:
    """Whether nothing is compressed and nothing fed back, so that gradients are averaged as by Horovod."""
    return settings.feedback == "none" and settings.local_steps == 1 and layout.dense


def takes_part(parameter: Tensor) -> bool:
    """Whether the torch optimizer may move it: it steps with any gradient there is."""
    return parameter.requires_grad or parameter.grad is not None


def _bytes(entries: Iterable[Entry], dtype: torch.dtype) -> int:
    return sum(parameter.numel() for _, parameter, _ in entries) * dtype.itemsize


def _bucket(index: int, entries: list[Entry], block_size: int | None) -> Bucket:
    slots: list[Slot] = []
    start = 0
    for name, parameter, _ in entries:
        slots.append(Slot(name, parameter, start))
        start = slots[-1].stop
    parameter, compressor = entries[0][1], entries[0][2]
    blocks = Blocks.cut([p.numel() for _, p, _ in entries], block_size, state_dtype(parameter.dtype))
    return Bucket(index, tuple(slots), compressor, blocks, parameter.device)
