"""Finds compressors whose payloads could differ where several ranks encode the same input. Local."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from hvd_saef.compression import BlockedTensor, Blocks, Compressor, Run
from hvd_saef.memory.layout import Bucket, Layout
from hvd_saef.settings import Settings
from hvd_saef.transport.communicator import Communicator

MOST = 4096
"""The largest block, in elements, that is encoded to try a compressor."""


def check_compressors(layout: Layout, settings: Settings, communicator: Communicator) -> None:
    """Raises ValueError for a compressor with which x or a worker's error would differ between ranks.

    Local. A compressor that claims to be deterministic is tried on a small input.
    """
    for bucket in {bucket.compressor.description: bucket for bucket in layout.buckets}.values():
        if bucket.compressor.deterministic:
            _try_twice(bucket)
        else:
            _refuse_where_encoded_twice(bucket, settings, communicator)


def _refuse_where_encoded_twice(bucket: Bucket, settings: Settings, communicator: Communicator) -> None:
    what = f"compression={bucket.compressor.description} says deterministic = False, but "
    advice = "or let it draw from delta.uniform(run), as hvd_saef.Compressor.encode says."
    if communicator.workers < communicator.size:
        raise ValueError(
            f"{what}all ranks of a worker encode its error, each for itself: leave worker at 'rank', {advice}"
        )
    replicated = bucket.dense or not settings.sharded(communicator.workers)
    if settings.double_compression and replicated and communicator.workers > 1:
        raise ValueError(
            f"{what}every worker encodes the server's answer for itself, so x would differ between them: "
            f"pass server='sharded' or double_compression=False, {advice}"
        )


def _try_twice(bucket: Bucket) -> None:
    """Encodes one input twice, into payloads with different old content; ValueError if results differ.

    A copy of the compressor is used, so that the trial leaves no trace in the user's object.
    """
    if not bucket.numel:
        return
    compressor = copy.deepcopy(bucket.compressor)
    largest = max(bucket.blocks.runs, key=lambda run: run.size)
    run = Run(0, min(largest.size, MOST), min(largest.count, 2))
    blocks = Blocks((run,), bucket.dtype)
    given = torch.linspace(-1, 2, run.stop, dtype=bucket.dtype, device=bucket.device)
    first, second = (_encode(compressor, BlockedTensor(given.clone(), blocks), fill) for fill in (0, 255))
    if not all(map(torch.equal, first, second)):
        raise ValueError(
            f"compression={bucket.compressor.description}: encode made two different things of the same "
            "input, so x would differ between workers. Random numbers come from delta.uniform(run), and "
            "nothing from earlier calls; or say deterministic = False, for a sharded server or single-way "
            "compression."
        )


def _encode(compressor: Compressor, delta: BlockedTensor, fill: int) -> tuple[Tensor, Tensor]:
    """Returns, as bytes, what encode leaves in `delta` and the tensor that the payload decodes to."""
    payload = torch.full(
        [compressor.payload_bytes(delta.blocks)], fill, dtype=torch.uint8, device=delta.flat.device
    )
    compressor.encode(delta, payload)
    sent = BlockedTensor(torch.zeros_like(delta.flat), delta.blocks)
    compressor.decode_add(payload, sent, 1.0)
    return delta.flat.view(torch.uint8), sent.flat.view(torch.uint8)
