"""Finds modules of `model=` that need special settings, and refuses them or warns of them. Local."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hvd_saef.compression import Compressor, state_dtype
from hvd_saef.memory.layout import Layout

Embedding = nn.Embedding | nn.EmbeddingBag
MOST = 4096
"""The most elements of a block that is compressed to try a compressor."""


def refuse_writing_modules(models: Sequence[nn.Module], parameters: Sequence[Tensor]) -> None:
    """Raises ValueError for a module that changes any of `parameters` in its forward pass."""
    for name, module in _embeddings(models):
        if module.max_norm is not None and any(module.weight is parameter for parameter in parameters):
            raise ValueError(
                f"model={name!r} is a {type(module).__name__} with max_norm={module.max_norm!r}, and writes "
                "to its weight in each forward pass, on every rank to other rows: x would differ between "
                "ranks. Pass max_norm=None, and scale rows without writing, by a parametrization: "
                "docs/horovod.md has one."
            )


def advise_on_unused_rows(models: Sequence[nn.Module], layout: Layout, block_size: int | None) -> None:
    """Warns of embeddings with rows that get no update, but that the updates of other rows would move."""
    compressors = {slot.parameter: bucket.compressor for bucket in layout.buckets for slot in bucket.slots}
    names = {slot.parameter: slot.name for slot in layout.slots}
    holders: Counter[Tensor] = Counter(
        parameter
        for model in models
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    for _, module in _embeddings(models):
        weight = module.weight
        size = min(block_size or weight.numel(), weight.numel())
        unused = "sparse=True" if module.padding_idx is None else f"padding_idx={module.padding_idx}"
        if (
            (module.sparse or module.padding_idx is not None)
            and weight in compressors
            and holders[weight] == 1  # a weight that is an output layer, too, has updates in all rows
            and module.embedding_dim % size
            and _moves_zeros(compressors[weight], size, weight)
        ):
            warnings.warn(
                f"{names[weight]!r} of {type(module).__name__}({unused}) has rows that get no update, and "
                f"blocks of {size} elements that are not within rows of {module.embedding_dim}: what is sent "
                "gives all elements of a block ± one scale, so that other rows of the block move these. Pass "
                f"block_size={module.embedding_dim}, or a callable as compression that gives "
                "Compression.topk(ratio) or Compression.none for this parameter.",
                stacklevel=3,
            )


def _embeddings(models: Sequence[nn.Module]) -> Iterator[tuple[str, Embedding]]:
    """Yields each embedding of the models once, with the name that its model has for it."""
    seen: set[int] = set()
    for model in models:
        for name, module in model.named_modules():
            if isinstance(module, Embedding) and id(module) not in seen:
                seen.add(id(module))
                yield name or type(module).__name__, module


def _moves_zeros(compressor: Compressor, size: int, weight: Tensor) -> bool:
    """Returns True if C changes zeros in a block of `size` elements of which one is not zero."""
    block = torch.zeros(min(size, MOST), dtype=state_dtype(weight.dtype), device=weight.device)
    block[0] = 1
    return bool(compressor.apply(block)[1:].any())
