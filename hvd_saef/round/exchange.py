"""A round: each bucket's trip from the workers to the server and back. Collective.

A trip: encode → gather (or alltoall to the sharded server) → serve → gather the answers → decode. The
steps between encoding and decoding run in the background: one thread takes payloads up to the server,
another serves and takes the answers down; each handles one bucket after the other. With overlap, a third
thread encodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from hvd_saef.compression import BlockedTensor, Compression, Compressor, Draws
from hvd_saef.memory import algorithm
from hvd_saef.memory.buffers import Buffers
from hvd_saef.memory.state import BucketState, State
from hvd_saef.round.agreement import agree_on_sizes
from hvd_saef.round.averaging import average_errors, averages_next
from hvd_saef.round.statistics import Statistics, ring_bytes
from hvd_saef.round.team_means import TeamMeans
from hvd_saef.round.trip import HERE, Trip
from hvd_saef.settings import Settings
from hvd_saef.transport.background import Background
from hvd_saef.transport.communicator import Channel, Communicator
from hvd_saef.transport.lines import Lines

BOTH_WAYS = (Channel.UP, Channel.DOWN)
AT_A_TIME = 3
"""The number of buckets under way at a time: one is encoded, one is on the wire, one is decoded."""


class Exchange:
    """Carries out one optimizer's exchanges over its communicator, and counts their bytes and seconds."""

    def __init__(
        self, communicator: Communicator, lines: Lines, settings: Settings, statistics: Statistics
    ) -> None:
        """Use `communicator`, which communicates on one of the `lines`."""
        self.communicator = communicator
        self.settings = settings
        self.statistics = statistics
        self.means = TeamMeans(communicator, statistics)
        self.failure: Exception | None = None
        """The first exception of this rank in the round under way, from the compressor or for lack of memory.
        The other ranks wait for the bucket, so the bucket is sent nevertheless, with a payload of zeros."""
        self._payload_sizes: dict[int, list[int]] = {}
        self._idle = [Buffers() for _ in range(AT_A_TIME)]
        self._under_way: deque[Trip] = deque()
        self._lines = lines
        self._aside = Background(f"hvd_saef encoding {communicator.rank}")
        """The encoding thread. It waits for no other worker, so this worker may wait for it at any time."""

    @property
    def under_way(self) -> Collection[Trip]:
        """The trips of the buckets that have left and not yet landed. Local."""
        return self._under_way

    @property
    def busy(self) -> bool:
        """True if any bucket is under way. Local."""
        return bool(self._under_way)

    # -- the parameters' start points -------------------------------------------------------------

    def start_point(self, state: BucketState) -> Tensor:
        """Returns b of row 2, [numel], in new memory, rounded to the parameters' dtypes. Local."""
        return state.start_point(self.settings.alpha, self.settings.beta, state.s)

    @torch.no_grad()
    def show_start_points(self, buckets: Iterable[BucketState]) -> None:
        """Writes b into the parameters of `buckets`, in place. Local."""
        for bucket_state in buckets:
            bucket_state.show(self.start_point(bucket_state))

    def agree_on_sizes(self, state: State | None) -> None:
        """Asks the compressors for the payloads' sizes, which must be equal on all ranks. Collective.

        All ranks raise ConfigurationMismatchError if the sizes differ. If a compressor raises on a rank, that
        rank raises the same exception and the others WorkerError.
        """
        buckets = [one for one in state.buckets if one.bucket.numel] if state else []
        self._payload_sizes = agree_on_sizes(
            self.communicator,
            lambda: {
                one.bucket.index: [one.bucket.compressor.payload_bytes(part.blocks) for part in one.parts]
                for one in buckets
            },
        )

    def take_failure(self) -> Exception | None:
        """Returns this rank's `failure` in the round that is over, or None, and clears it. Local."""
        failure, self.failure = self.failure, None
        return failure

    # -- a round ----------------------------------------------------------------------------------

    @torch.no_grad()
    def complete_round(self, state: State) -> None:
        """Does rows 4 to 6, with the parameters as y, then rows 1 and 2 of the next round. Collective."""
        early = list(self._under_way)
        for bucket_state in self._waiting(state):
            if not self._idle and not early:
                self._take_down(state)
            self.depart(state, bucket_state)
        # The buckets sent during backward have arrived: a background thread is free to land half of them.
        down = self.communicator.background(Channel.DOWN) if early else HERE
        for trip in early[1::2]:
            trip.landed = down.submit(self._land, state, trip)
        while self._under_way:
            self._take_down(state)
        due = [one for one in state.buckets if averages_next(self.settings, state, one)]
        state.progress.completed_round()
        wire_dtype = torch.float16 if self.settings.averaging_fp16 else None
        average_errors(self.communicator, self.statistics, due, wire_dtype)
        with self._noting():
            self.show_start_points(due)

    def order(self, state: State) -> list[BucketState]:
        """Returns the buckets in the order of sending, equal on all ranks: as in backward, held ones last."""
        order = [one for one in reversed(state.buckets) if one.bucket.index in self._payload_sizes]
        return sorted(order, key=lambda bucket_state: self.held(state, bucket_state))

    def held(self, state: State, bucket_state: BucketState) -> bool:
        """Returns True if the bucket must not leave before step(). Local, with one result on all ranks.

        Horovod may or may not fuse the means of two optimizers that are under way at the same time, by
        chance, and fusion changes the rounding. In step() only one optimizer is under way.
        """
        if not (self.settings.overlap and self._lines.shared):
            return False
        compressor = self._compressor(bucket_state, state.rounds)
        return self.communicator.team.size > 1 or compressor.wire_dtype(bucket_state.bucket.dtype) is not None

    def _compressor(self, state: BucketState, rounds: int) -> Compressor:
        return Compression.none if rounds < self.settings.warmup_steps else state.bucket.compressor

    def _waiting(self, state: State) -> list[BucketState]:
        """Returns the buckets that have not left, in the order of sending."""
        gone = {id(trip.state) for trip in self._under_way}
        return [bucket_state for bucket_state in self.order(state) if id(bucket_state) not in gone]

    # -- a bucket's trip --------------------------------------------------------------------------

    def depart(
        self, state: State, bucket_state: BucketState, before: Callable[[], None] = lambda: None
    ) -> None:
        """Does row 4 of one bucket, after `before`, and sends the bucket in the background. Collective.

        With overlap, `before` and row 4 run in the background too. `before` must not raise, as other ranks
        expect the bucket. Without overlap, an only bucket is sent in this thread: threads would cost time.
        """
        trip = self._prepare(bucket_state, state.rounds)
        overlap, alone = self.settings.overlap, len(state.buckets) == 1
        up, down = (HERE if alone and not overlap else self.communicator.background(c) for c in BOTH_WAYS)
        trip.encoded = (self._aside if overlap else HERE).submit(self._encode, trip, before)
        trip.gathered = up.submit(self._gather, trip)
        trip.arrived = down.submit(self._answer, trip)
        self._under_way.append(trip)

    def wait_until_encoded(self) -> None:
        """Waits until the background neither changes nor reads the parameters any more. Local."""
        for trip in self._under_way:
            trip.encoded.result()

    def abandon(self, state: State) -> None:
        """Sends the buckets that have not left, and drops what arrives: all ranks gave up. Collective."""
        for bucket_state in self._waiting(state):
            self.depart(state, bucket_state)
        while self._under_way:
            trip = self._under_way.popleft()
            trip.arrived.result()
            self._idle.append(trip.buffers)
        self.failure = None

    def _prepare(self, state: BucketState, rounds: int) -> Trip:
        bucket, settings = state.bucket, self.settings
        warmup = rounds < settings.warmup_steps
        compressor = self._compressor(state, rounds)
        fits = bucket.device.type == "cpu" and self.communicator.alike
        rows = compressor.fused if fits else None
        wire = compressor.wire_dtype(bucket.dtype)
        parts = state.parts if wire is None else bucket.parts(1)
        sizes = self._payload_sizes[bucket.index]
        if compressor is not bucket.compressor:
            sizes = [compressor.payload_bytes(part.blocks) for part in parts]
        buffers = self._idle.pop() if self._idle else Buffers()
        memories = state.memories(parts, settings.alpha, settings.beta)
        draws, served = Draws.of(rounds, bucket.index, self.communicator.worker), None
        if state.s is not None and not warmup:
            part = parts[state.mine]
            served = BlockedTensor(state.s, part.blocks, Draws.of(rounds, bucket.index, None, part.start))
        return Trip(
            state=state,
            plain=any(memory.points for memory in memories),
            rows=rows or algorithm.PlainRows(compressor, draws),
            memories=memories,
            wire=wire,
            served=served,
            buffers=buffers,
            what=f"bucket {bucket.index}, round {rounds + 1}",
            sent=buffers.pieces("sent", sizes, bucket.device),
        )

    def _take_down(self, state: State) -> None:
        """Lands the earliest trip, or waits until the background has landed it, and counts its bytes."""
        trip = self._under_way.popleft()
        if trip.landed is None:
            self._land(state, trip)
        else:
            trip.landed.result()
        self._idle.append(trip.buffers)
        self._count(trip)

    @torch.no_grad()
    def _land(self, all_of_it: State, trip: Trip) -> None:
        """Waits until the trip has arrived, and does its rows 6 and 2."""
        state = trip.state
        # If row 1 comes next, it changes e and so b: the parameters are written after it.
        shows = not averages_next(self.settings, all_of_it, state)
        with self.statistics.phase("exchange"):
            arrived = trip.arrived.result()
        weights = [1.0] if trip.served or trip.wire else self.communicator.weights
        with self.statistics.phase("decode"), self._noting():
            for memory, sent, payloads in zip(trip.memories, trip.sent, arrived, strict=True):
                shown = memory if shows else replace(memory, points=())
                trip.rows.receive(shown, sent, payloads, weights)
            if self.settings.feedback == "none":
                state.e.zero_()
                if state.s is not None:
                    state.s.zero_()
            if shows and not trip.plain:
                state.show(self.start_point(state))

    @torch.no_grad()
    def _encode(self, trip: Trip, before: Callable[[], None]) -> None:
        """Calls `before`, then does row 4."""
        before()
        state = trip.state
        with self.statistics.phase("encode"), self._noting(trip.sent):
            if not trip.plain:
                y = state.bucket.new_flat()
                torch._foreach_copy_(state.bucket.views(y), state.bucket.parameters)
                algorithm.add_update(state.e, self.start_point(state), y)
            for memory, piece in zip(trip.memories, trip.sent, strict=True):
                trip.rows.send(memory, piece)
            if trip.wire is not None and trip.wire != state.bucket.dtype:
                sent = trip.sent[0].view(trip.wire)
                sent.copy_(self._with_room(sent, state.e))

    def _with_room(self, sent: Tensor, e: Tensor) -> Tensor:
        """Returns `sent`, clamped so that the workers' sum fits its dtype; adds the rest to `e`, in place."""
        most = torch.finfo(sent.dtype).max / self.communicator.size
        fits = sent.clamp(-most, most)
        e.add_(sent.to(e.dtype) - fits.to(e.dtype))
        return fits

    @torch.no_grad()
    def _gather(self, trip: Trip) -> list[Tensor]:
        """Returns the payloads that this worker's server needs, or (dense) their mean as the only payload."""
        trip.encoded.result()  # raises the exception of the encoding, if any
        state, communicator = trip.state, self.communicator
        communicator.doing[Channel.UP] = trip.what
        if trip.wire is not None:
            name = f"dense.{state.bucket.index}"
            communicator.allreduce_mean(trip.sent[0].view(trip.wire), name)
            return trip.sent
        size = trip.sent[state.mine].numel()
        payloads = trip.buffers.pieces("incoming", communicator.workers * [size], state.bucket.device)
        if state.sharded:
            communicator.alltoall(trip.sent, payloads)
        else:
            communicator.allgather(trip.sent[0], payloads, Channel.UP)
        return payloads

    @torch.no_grad()
    def _answer(self, trip: Trip) -> list[list[Tensor]]:
        """Does row 5' and returns the answers, part by part; or, single-way, the gathered payloads."""
        payloads = trip.gathered.result()
        if trip.served is None:
            return [payloads]
        state, device = trip.state, trip.state.bucket.device
        (answer,) = trip.buffers.pieces("answer", [trip.sent[state.mine].numel()], device)
        weights = [1.0] if trip.wire else self.communicator.weights  # a mean is one payload
        with self._noting([answer]):
            trip.rows.serve(payloads, weights, trip.served, answer)
        if len(trip.sent) == 1:
            return [[answer]]
        self.communicator.doing[Channel.DOWN] = trip.what
        answers = trip.buffers.pieces("answers", [piece.numel() for piece in trip.sent], device)
        self.communicator.allgather(answer, answers, Channel.DOWN)
        return [[answer] for answer in answers]

    @contextmanager
    def _noting(self, payload: Iterable[Tensor] = ()) -> Iterator[None]:
        """Notes in `failure` an exception raised inside, and zeroes `payload`, for which the others wait."""
        try:
            yield
        except Exception as failure:
            self.failure = self.failure or failure
            for piece in payload:
                piece.zero_()

    def _count(self, trip: Trip) -> None:
        statistics, others = self.statistics, self.communicator.workers - 1
        sizes = [piece.numel() for piece in trip.sent]
        total, own = sum(sizes), sizes[trip.state.mine if len(sizes) > 1 else 0]
        if trip.wire:
            statistics.dense_bytes_sent += ring_bytes(self.communicator.workers, total)
            statistics.node_bytes_sent += self.communicator.passed_on_of_mean(trip.sent[0].view(trip.wire))
        elif len(sizes) > 1:  # sends a part to each other worker, and its answer to all
            statistics.payload_bytes_sent += total - own + others * own
            statistics.payload_bytes_received += others * own + total - own
            answers = [size for k, size in enumerate(sizes) if k != trip.state.mine]
            statistics.node_bytes_sent += self.communicator.passed_on(others * [own] + answers)
        else:
            statistics.payload_bytes_sent += others * total
            statistics.payload_bytes_received += others * total
            statistics.node_bytes_sent += self.communicator.passed_on(others * [total])
        statistics.ring_allreduce_bytes += ring_bytes(self.communicator.workers, 4 * trip.state.bucket.numel)
