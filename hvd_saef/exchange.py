"""A round: each bucket's trip from the workers to the server and back. Collective.

A trip: encode → gather (or alltoall to the sharded server) → serve → gather the answers → decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_saef import algorithm
from hvd_saef.communicator import Communicator
from hvd_saef.compression import BlockedTensor, Compression, Compressor
from hvd_saef.layout import Bucket, Layout
from hvd_saef.settings import Settings
from hvd_saef.state import BucketState, State, cut_stretches
from hvd_saef.statistics import Statistics, ring_bytes


class Exchange:
    """Carries the rounds of one optimizer over its communicator and counts what they cost."""

    def __init__(self, communicator: Communicator, settings: Settings, statistics: Statistics) -> None:
        self.communicator = communicator
        self.settings = settings
        self.statistics = statistics

    # -- the parameters' start points -------------------------------------------------------------

    def start_point(self, state: BucketState) -> Tensor:
        """Row 2's b, flat, in new memory, rounded as the parameters round it."""
        b = algorithm.step_ahead(state.x, state.e, state.s, self.settings.alpha, self.settings.beta)
        for slot in state.bucket.slots:
            if slot.parameter.dtype != b.dtype:
                view = slot.view(b)
                view.copy_(view.to(slot.parameter.dtype))
        return b

    @torch.no_grad()
    def show_start_points(self, state: State) -> None:
        """Write b into all parameters."""
        for bucket_state in state.buckets:
            state.show(bucket_state, self.start_point(bucket_state))

    # -- a round ----------------------------------------------------------------------------------

    @torch.no_grad()
    def complete_round(self, state: State) -> None:
        """Rows 4 to 6 of this round, from where the parameters are now, and 1 and 2 of the next."""
        warmup = state.rounds < self.settings.warmup_steps
        for bucket_state in state.buckets:
            if bucket_state.bucket.numel:
                self._trip(bucket_state, warmup)
        state.rounds += 1
        period = self.settings.averaging_period
        if period is not None and (state.rounds + 1) % period == 0:
            self.average_errors(state)
        self.show_start_points(state)

    def average_errors(self, state: State) -> None:
        """Row 1: e ← the mean of all workers' e, by Horovod's ring allreduce."""
        with self.statistics.phase("averaging"):
            for bucket_state in state.buckets:
                if bucket_state.bucket.numel:
                    name = f"error.{bucket_state.bucket.index}"
                    self.communicator.allreduce_mean(bucket_state.e, name)
                    self.statistics.averaging_bytes_sent += self._ring(bucket_state.e)

    def whole_server_errors(self, state: State) -> dict[str, Any]:
        """All of s, by parameter, on every worker, from the parts that they serve."""
        whole: dict[str, Any] = {}
        for bucket_state in state.buckets:
            s = bucket_state.s
            if s is not None and bucket_state.sharded:
                sizes = [(part.stop - part.start) * s.element_size() for part in bucket_state.parts]
                parts = self.communicator.allgather(s.view(torch.uint8), sizes)
                s = torch.cat([part.view(bucket_state.x.dtype) for part in parts])
            if s is not None:
                whole |= cut_stretches(bucket_state.bucket, s, 0)
        return whole

    def _trip(self, state: BucketState, warmup: bool) -> None:
        bucket = state.bucket
        compressor = Compression.none if warmup else bucket.compressor
        wire_dtype = compressor.wire_dtype(bucket.dtype)
        with self.statistics.phase("encode"):
            y = bucket.new_flat()
            torch._foreach_copy_(bucket.views(y), bucket.parameters)
            algorithm.add_update(state.e, self.start_point(state), y)
            del y
            pieces = self._encode(state, compressor, whole=wire_dtype is not None)
        if wire_dtype is not None:
            self._through_horovod(state, compressor, pieces[0], wire_dtype, double=not warmup)
        else:
            self._through_mpi(state, compressor, pieces)
        if self.settings.feedback == "none":
            state.e.zero_()
            if state.s is not None:
                state.s.zero_()
        self.statistics.ring_allreduce_bytes += ring_bytes(self.communicator.size, 4 * bucket.numel)

    def _encode(self, state: BucketState, compressor: Compressor, whole: bool) -> list[Tensor]:
        """The payloads of all parts."""
        pieces = []
        for part in state.bucket.parts(1) if whole else state.parts:
            piece = _bytes(compressor.payload_bytes(part.blocks), state.bucket)
            algorithm.send(BlockedTensor(state.e[part.start : part.stop], part.blocks), compressor, piece)
            pieces.append(piece)
        return pieces

    def _through_horovod(
        self, state: BucketState, compressor: Compressor, payload: Tensor, wire: torch.dtype, double: bool
    ) -> None:
        """Rows 5 and 6 where the payloads' mean is itself a payload."""
        bucket = state.bucket
        with self.statistics.phase("exchange"):
            self.communicator.allreduce_mean(payload.view(wire), f"dense.{bucket.index}")
        self.statistics.dense_bytes_sent += self._ring(payload)
        with self.statistics.phase("decode"):
            if double and state.s is not None:
                mean, payload = payload, _bytes(payload.numel(), bucket)
                algorithm.serve([mean], 1.0, BlockedTensor(state.s, bucket.blocks), compressor, payload)
            algorithm.receive([payload], 1.0, BlockedTensor(state.x, bucket.blocks), compressor)

    def _through_mpi(self, state: BucketState, compressor: Compressor, pieces: list[Tensor]) -> None:
        """Rows 5 (or 5') and 6 for gathered payloads; a sharded server gets its part of them only."""
        bucket, communicator = state.bucket, self.communicator
        sizes = [piece.numel() for piece in pieces]
        with self.statistics.phase("exchange"):
            if state.sharded:
                arrived = communicator.alltoall(pieces)
                own = sizes[state.mine]
                self._count(sent=sum(sizes) - own, received=(communicator.size - 1) * own)
            else:
                arrived = self._gather(pieces[0], communicator.size * sizes)
        weight = 1 / communicator.size
        x = BlockedTensor(state.x, bucket.blocks)
        if state.s is None:
            with self.statistics.phase("decode"):
                algorithm.receive(arrived, weight, x, compressor)
            return
        with self.statistics.phase("decode"):
            answer = _bytes(sizes[state.mine], bucket)
            served = BlockedTensor(state.s, state.parts[state.mine].blocks)
            algorithm.serve(arrived, weight, served, compressor, answer)
        with self.statistics.phase("exchange"):
            answers = self._gather(answer, sizes) if state.sharded else [answer]
        with self.statistics.phase("decode"):
            for part, answer in zip(state.parts, answers, strict=True):
                x = BlockedTensor(state.x[part.start : part.stop], part.blocks)
                algorithm.receive([answer], 1.0, x, compressor)

    def _gather(self, payload: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        others = self.communicator.size - 1
        self._count(sent=others * payload.numel(), received=sum(sizes) - payload.numel())
        return self.communicator.allgather(payload, sizes)

    def _count(self, sent: int, received: int) -> None:
        self.statistics.payload_bytes_sent += sent
        self.statistics.payload_bytes_received += received

    def _ring(self, tensor: Tensor) -> int:
        return ring_bytes(self.communicator.size, tensor.numel() * tensor.element_size())

    # -- without feedback and compression: Horovod's own arithmetic --------------------------------

    @torch.no_grad()
    def average_gradients(self, layout: Layout) -> None:
        """Replace every gradient by the workers' mean; one that is missing counts as zero."""
        for bucket in layout.buckets:
            flat = bucket.new_flat()
            gradients, views = [], []
            for slot in bucket.slots:
                if slot.trains:  # not requires_grad, which one worker may have changed since
                    if slot.parameter.grad is None:
                        slot.parameter.grad = torch.zeros_like(slot.parameter)
                    gradients.append(slot.parameter.grad)
                    views.append(slot.view(flat))
            if not gradients:
                continue
            torch._foreach_copy_(views, gradients)
            wire = flat.to(bucket.compressor.wire_dtype(bucket.dtype))
            with self.statistics.phase("exchange"):
                self.communicator.allreduce_mean(wire, f"gradient.{bucket.index}")
            flat.copy_(wire)
            torch._foreach_copy_(gradients, views)
            self.statistics.dense_bytes_sent += self._ring(wire)
            self.statistics.ring_allreduce_bytes += ring_bytes(self.communicator.size, 4 * bucket.numel)


def _bytes(number: int, bucket: Bucket) -> Tensor:
    return torch.empty(number, dtype=torch.uint8, device=bucket.device)
