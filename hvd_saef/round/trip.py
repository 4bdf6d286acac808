"""One bucket's trip from the workers to the server and back, told in order. Collective.

encode → gather (or alltoall to the sharded server) → serve → gather the answers → land. The steps between
encoding and landing run in the background: one thread takes payloads up to the server, another serves and
takes the answers down; each handles one bucket after the other. With overlap, a third thread encodes. On a
GPU each of these threads has a stream of its own, and what one step hands to the next is :class:`Done`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hvd_saef.compression import BlockedTensor, Fused, Memory
from hvd_saef.memory import algorithm
from hvd_saef.memory.state import BucketState
from hvd_saef.older_torch import raise_versions
from hvd_saef.round.statistics import Statistics
from hvd_saef.settings import Settings
from hvd_saef.transport.background import Done
from hvd_saef.transport.buffers import Buffers
from hvd_saef.transport.communicator import Channel, Communicator


class FirstFailure:
    """The first exception of this rank within the exchange of a round. Local.

    It comes from the compressor, or for lack of memory. The other ranks wait for the bucket, so the bucket is
    sent nevertheless, with a payload of zeros, and all ranks are told at the end of the round.
    """

    def __init__(self) -> None:
        self._failure: Exception | None = None

    @property
    def seen(self) -> Exception | None:
        """The exception, or None."""
        return self._failure

    def take(self) -> Exception | None:
        """Returns the exception, or None, and forgets it."""
        failure, self._failure = self._failure, None
        return failure

    @contextmanager
    def noting(self, payload: Iterable[Tensor] = ()) -> Iterator[None]:
        """Notes an exception that is raised inside, and zeroes `payload`, for which the others wait."""
        try:
            yield
        except Exception as failure:
            self._failure = self._failure or failure
            for piece in payload:
                piece.zero_()


@dataclass
class Trip:
    """One bucket in one round. Its methods are the trip's steps, in their order."""

    bucket_state: BucketState
    plain: bool
    """True if one pass can go through the parameters' memory directly; otherwise they are copied."""
    rows: Fused
    memories: list[Memory]
    wire: torch.dtype | None
    """The dtype of numbers that Horovod averages; None if MPI gathers the payload as bytes."""
    served: BlockedTensor | None
    """The part of s that this worker serves; None without a server (and in warm-up rounds)."""
    buffers: Buffers
    what: str
    """The bucket and the round in words, for messages."""
    sent: list[Tensor]
    """This worker's payload for each part, all in one buffer."""
    communicator: Communicator
    settings: Settings
    statistics: Statistics
    failure: FirstFailure
    encoded: Future[Done[None]] = field(default_factory=Future)
    """Done when :meth:`encode` is done."""
    gathered: Future[Done[list[Tensor]]] = field(default_factory=Future)
    """What :meth:`gather` returns."""
    arrived: Future[Done[list[list[Tensor]]]] = field(default_factory=Future)
    """What :meth:`serve` returns: for each part the payloads of row 6."""
    landed: Future[Done[None]] | None = None
    """Done when :meth:`land` is done, if the background does that; else None."""

    @torch.no_grad()
    def encode(self, before: Callable[[], None]) -> None:
        """Calls `before`, then does row 4. Local."""
        before()
        bucket_state = self.bucket_state
        with self.statistics.phase("encode", bucket_state.bucket.device), self.failure.noting(self.sent):
            if not self.plain:
                y = bucket_state.bucket.new_flat()
                torch._foreach_copy_(bucket_state.bucket.views(y), bucket_state.bucket.parameters)
                algorithm.add_update(bucket_state.e, self._start_point(), y)
            self.rows.send(self.memories, self.sent)
            if self.wire is not None and self.wire != bucket_state.bucket.dtype:
                sent = self.sent[0].view(self.wire)
                sent.copy_(self._with_room(sent))

    @torch.no_grad()
    def gather(self) -> list[Tensor]:
        """Returns the payloads that this worker's server needs, or (dense) their mean as the only payload."""
        self.encoded.result().take()  # raises the exception of the encoding, if any
        bucket_state, communicator = self.bucket_state, self.communicator
        communicator.doing[Channel.UP] = self.what
        if self.wire is not None:
            name = f"dense.{bucket_state.bucket.index}"
            communicator.allreduce_mean(self.sent[0].view(self.wire), name)
            return self.sent
        size = self.sent[bucket_state.mine].numel()
        payloads = self.buffers.pieces("incoming", communicator.workers * [size], bucket_state.bucket.device)
        if bucket_state.sharded:
            communicator.alltoall(self.sent, payloads)
        else:
            communicator.allgather(self.sent[0], payloads, Channel.UP)
        return payloads

    @torch.no_grad()
    def serve(self) -> list[list[Tensor]]:
        """Does row 5' and returns the answers, part by part; or, single-way, the gathered payloads."""
        payloads = self.gathered.result().take()
        if self.served is None:
            return [payloads]
        bucket_state, device = self.bucket_state, self.bucket_state.bucket.device
        (answer,) = self.buffers.pieces("answer", [self.sent[bucket_state.mine].numel()], device)
        weights = [1.0] if self.wire else self.communicator.weights  # a mean is one payload
        with self.failure.noting([answer]):
            self.rows.serve(payloads, weights, self.served, answer)
        if len(self.sent) == 1:
            return [[answer]]
        self.communicator.doing[Channel.DOWN] = self.what
        answers = self.buffers.pieces("answers", [piece.numel() for piece in self.sent], device)
        self.communicator.allgather(answer, answers, Channel.DOWN)
        return [[answer] for answer in answers]

    @torch.no_grad()
    def land(self, shows: bool) -> None:
        """Waits for the answers, does row 6, and also row 2 if it `shows` b in the parameters. Local."""
        bucket_state, device = self.bucket_state, self.bucket_state.bucket.device
        with self.statistics.phase("exchange", device):
            arrived = self.arrived.result().take()
        weights = [1.0] if self.served or self.wire else self.communicator.weights
        with self.statistics.phase("decode", device), self.failure.noting():
            memories = self.memories if shows else [replace(m, parameter_memory=()) for m in self.memories]
            self.rows.receive(memories, self.sent, arrived, weights)
            if self.settings.feedback == "none":
                bucket_state.e.zero_()
                if bucket_state.s is not None:
                    bucket_state.s.zero_()
            if shows and not self.plain:
                bucket_state.show(self._start_point())
            elif shows:  # kernels write past autograd, which must know of it
                raise_versions(bucket_state.bucket.parameters)

    def count(self) -> None:
        """Adds the bytes of the trip to the statistics. Local."""
        self.statistics.count_payloads(
            self.communicator,
            [piece.numel() for piece in self.sent],
            mine=self.bucket_state.mine,
            mean=self.sent[0].view(self.wire) if self.wire else None,
            elements=self.bucket_state.bucket.numel,
        )

    def _start_point(self) -> Tensor:
        return self.bucket_state.start_point(self.settings.alpha, self.settings.beta, self.bucket_state.s)

    def _with_room(self, sent: Tensor) -> Tensor:
        """Returns `sent`, clamped so that the workers' sum fits its dtype; adds the rest to e, in place."""
        most, e = torch.finfo(sent.dtype).max / self.communicator.size, self.bucket_state.e
        fits = sent.clamp(-most, most)
        e.add_(sent.to(e.dtype) - fits.to(e.dtype))
        return fits
