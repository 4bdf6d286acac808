"""Lays out parameters in buckets, and cuts buckets into blocks and the servers' parts. Local."""

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
"""The first bucket is this many times smaller: backward completes it last, so nothing hides its exchange."""
ChooseCompressor = Callable[[str, Tensor], Compressor]
Entry = tuple[str, Tensor, Compressor]
"""A parameter's name, the parameter and its compressor."""


def _form(parameter: Tensor) -> tuple[Any, ...]:
    return parameter.dtype, parameter.device, tuple(parameter.shape), parameter.stride()


@dataclass(frozen=True)
class Slot:
    """The place of one parameter in its bucket's flat memory."""

    name: str
    parameter: Tensor
    start: int
    form: tuple[Any, ...] = field(init=False)
    """The dtype, device, shape and strides that the parameter had when it was laid out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "form", _form(self.parameter))

    def change(self) -> str | None:
        """Returns in words what of `form` has changed since then; None if nothing has."""
        now = _form(self.parameter)
        if now == self.form:
            return None
        what = ("dtype", "device", "shape", "strides")
        i = next(i for i in range(len(what)) if now[i] != self.form[i])
        return f"changed its {what[i]} from {self.form[i]} to {now[i]}"

    @property
    def stop(self) -> int:
        """The index of the element after the parameter's last one."""
        return self.start + self.parameter.numel()

    def view(self, flat: Tensor) -> Tensor:
        """Returns a view of the parameter's place in `flat`, in the parameter's shape.

        The elements are in the parameter's memory order where its memory has no gaps (channels_last
        too), so that copies run straight through memory; otherwise they are in logical order.
        """
        part = flat[self.start : self.stop]
        if is_gapless(self.parameter):
            return part.as_strided(
                self.parameter.shape, self.parameter.stride(), storage_offset=part.storage_offset()
            )
        return part.view(self.parameter.shape)


@dataclass(frozen=True)
class Part:
    """Whole blocks of a bucket, from element `start` to `stop`, which one server of a sharded DC serves."""

    start: int
    stop: int
    blocks: Blocks


@dataclass(frozen=True)
class Bucket:
    """Parameters with one compressor, one dtype of x and one device, end to end in one flat memory."""

    index: int
    slots: tuple[Slot, ...]
    compressor: Compressor
    blocks: Blocks
    device: torch.device

    @property
    def numel(self) -> int:
        """The number of elements of all the bucket's parameters."""
        return self.blocks.numel

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of x, e and s, which is float32 or wider."""
        return self.blocks.dtype

    @property
    def dense(self) -> bool:
        """True if Horovod's allreduce averages the bucket's payloads."""
        return self.compressor.wire_dtype(self.dtype) is not None

    @cached_property
    def parameters(self) -> list[Tensor]:
        """The bucket's parameters, in the order of the slots."""
        return [slot.parameter for slot in self.slots]

    def new_flat(self) -> Tensor:
        """Returns new flat memory for the bucket, [numel], filled with zeros."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Returns a view of `flat` ([numel]) for each parameter, in the parameter's shape."""
        return [slot.view(flat) for slot in self.slots]

    def parts(self, number: int) -> list[Part]:
        """Cuts the bucket at block boundaries into `number` parts, which are as even as the blocks allow."""
        cuts = [self.blocks.nearest_boundary(j * self.numel // number) for j in range(number)] + [self.numel]
        return [
            Part(start, stop, self.blocks.between(start, stop)) for start, stop in itertools.pairwise(cuts)
        ]


@dataclass(frozen=True)
class Layout:
    """All buckets of an optimizer, and the description that the workers must agree on."""

    buckets: tuple[Bucket, ...]
    description: dict[str, Any]
    frozen: tuple[Entry, ...] = ()
    """The optimizer's other parameters; they are left alone until they take part."""

    @cached_property
    def digest(self) -> str:
        """The SHA-256 hash of the description, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()

    @cached_property
    def slots(self) -> list[Slot]:
        """The slots of all buckets, bucket by bucket."""
        return [slot for bucket in self.buckets for slot in bucket.slots]

    @cached_property
    def devices(self) -> list[torch.device]:
        """The devices of the parameters, each once, in the order of the buckets; the CPU without any."""
        return list(dict.fromkeys(bucket.device for bucket in self.buckets)) or [torch.device("cpu")]

    @property
    def dense(self) -> bool:
        """True if every bucket is dense, and every bucket of frozen parameters will be, once these train."""
        later = ((compressor, state_dtype(parameter.dtype)) for _, parameter, compressor in self.frozen)
        return all(bucket.dense for bucket in self.buckets) and all(
            compressor.wire_dtype(dtype) is not None for compressor, dtype in later
        )

    def largest_share(self) -> tuple[float, str]:
        """Returns the largest compressed block, as a fraction of all compressed elements, and its parameter.

        The parameter is given by name. The result is (0.0, "") if no bucket is compressed.
        """
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
    """Lays out the parameters of `param_groups` that take part, in their order.

    The buckets of an `earlier` layout stay, and the parameters that it lacks get new buckets after them.
    Raises TypeError for a parameter of a dtype that is not real floating or a DTensor, ValueError for an
    expanded one.
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
                known = parameter.dtype in DTYPES  # integers, say, cannot be compressed
                frozen.append((name, parameter, choose(name, parameter) if known else Compression.none))
                continue
            _check_form(name, parameter)
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


def _check_form(name: str, parameter: Tensor) -> None:
    """Raises TypeError or ValueError for a parameter that cannot be laid out; see :func:`build_layout`."""
    if "DTensor" in {base.__name__ for base in type(parameter).__mro__}:
        raise TypeError(
            f"parameter {name!r} is a DTensor, of which each rank holds a part (FSDP, tensor parallelism): "
            "workers must hold whole parameters, as plain tensors."
        )
    if parameter.dtype not in DTYPES:
        raise TypeError(
            f"parameter {name!r} is of dtype {parameter.dtype}: float16, bfloat16, float32 and "
            "float64 are allowed. Leave it out of the optimizer."
        )
    strides = zip(parameter.stride(), parameter.shape, strict=True)
    if parameter.numel() and any(stride == 0 and size > 1 for stride, size in strides):
        raise ValueError(
            f"parameter {name!r} of shape {tuple(parameter.shape)} is expanded (strides "
            f"{parameter.stride()}): several of its elements are one number in memory. clone() it "
            "before it becomes a parameter."
        )


def averages_gradients(settings: Settings, layout: Layout) -> bool:
    """Returns True if gradients are averaged as by Horovod: nothing is compressed, nothing fed back."""
    return settings.feedback == "none" and settings.local_steps == 1 and layout.dense


def takes_part(parameter: Tensor) -> bool:
    """Returns True if the torch optimizer may change the parameter: it uses any gradient that exists."""
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
