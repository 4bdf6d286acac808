"""The rounds of one optimizer: which bucket leaves when, and what is done once all have landed. Collective.

The way of one bucket is in :mod:`hvd_saef.round.trip`. Several buckets are under way at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from hvd_saef import kernels
from hvd_saef.compression import BlockedTensor, Compression, Compressor, Draws
from hvd_saef.memory import algorithm
from hvd_saef.memory.state import BucketState, State
from hvd_saef.round.agreement import agree_on_sizes
from hvd_saef.round.averaging import average_errors, averages_next
from hvd_saef.round.statistics import Statistics
from hvd_saef.round.team_means import TeamMeans
from hvd_saef.round.trip import FirstFailure, Trip
from hvd_saef.settings import Settings
from hvd_saef.transport.background import HERE, Background
from hvd_saef.transport.buffers import Buffers
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
        self._failure = FirstFailure()
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

    @property
    def failure(self) -> Exception | None:
        """This rank's first exception in the round under way, or None. Local."""
        return self._failure.seen

    def take_failure(self) -> Exception | None:
        """Returns this rank's first exception in the round that is over, or None, and clears it. Local.

        Waits for the devices that have to tell of payloads that they refused.
        """
        with self._failure.noting():
            kernels.raise_refusals()
        return self._failure.take()

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
        for trip in early[1::2]:
            down, device = self.communicator.background(Channel.DOWN), trip.bucket_state.bucket.device
            trip.landed = down.on(device, trip.land, self._shows(state, trip))
        while self._under_way:
            self._take_down(state)
        due = [one for one in state.buckets if averages_next(self.settings, state, one)]
        state.progress.completed_round()
        wire_dtype = torch.float16 if self.settings.averaging_fp16 else None
        average_errors(self.communicator, self.statistics, due, wire_dtype)
        with self._failure.noting():
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
        gone = {id(trip.bucket_state) for trip in self._under_way}
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
        device = bucket_state.bucket.device
        trip.encoded = (self._aside if overlap else HERE).on(device, trip.encode, before)
        trip.gathered = up.on(device, trip.gather)
        trip.arrived = down.on(device, trip.serve)
        self._under_way.append(trip)

    def wait_until_encoded(self) -> None:
        """Waits until the background neither changes nor reads the parameters any more. Local."""
        for trip in self._under_way:
            trip.encoded.result().take()

    def abandon(self, state: State) -> None:
        """Sends the buckets that have not left, and drops what arrives: all ranks gave up. Collective."""
        for bucket_state in self._waiting(state):
            self.depart(state, bucket_state)
        while self._under_way:
            trip = self._under_way.popleft()
            trip.arrived.result().take()
            self._idle.append(trip.buffers)
        self.take_failure()

    def _prepare(self, state: BucketState, rounds: int) -> Trip:
        bucket, settings = state.bucket, self.settings
        warmup = rounds < settings.warmup_steps
        compressor = self._compressor(state, rounds)
        draws, served = Draws.of(rounds, bucket.index, self.communicator.worker), None
        fused = compressor.fused(bucket.device, bucket.dtype, self.communicator.alike)
        rows = fused or algorithm.PlainRows(compressor, draws)
        wire = compressor.wire_dtype(bucket.dtype)
        parts = state.parts if wire is None else bucket.parts(1)
        sizes = self._payload_sizes[bucket.index]
        if compressor is not bucket.compressor:
            sizes = [compressor.payload_bytes(part.blocks) for part in parts]
        buffers = self._idle.pop() if self._idle else Buffers()
        memories = state.memories(parts, settings.alpha, settings.beta, rows.narrow)
        if state.s is not None and not warmup:
            part = parts[state.mine]
            served = BlockedTensor(state.s, part.blocks, Draws.of(rounds, bucket.index, None, part.start))
        return Trip(
            bucket_state=state,
            plain=any(memory.parameter_memory for memory in memories),
            rows=rows,
            memories=memories,
            wire=wire,
            served=served,
            buffers=buffers,
            what=f"bucket {bucket.index}, round {rounds + 1}",
            sent=buffers.pieces("sent", sizes, bucket.device),
            communicator=self.communicator,
            settings=settings,
            statistics=self.statistics,
            failure=self._failure,
        )

    def _take_down(self, state: State) -> None:
        """Lands the earliest trip, or waits until the background has landed it, and counts its bytes."""
        trip = self._under_way.popleft()
        if trip.landed is None:
            trip.land(self._shows(state, trip))
        else:
            trip.landed.result().take()
        self._idle.append(trip.buffers)
        trip.count()

    def _shows(self, state: State, trip: Trip) -> bool:
        """Returns False if row 1 comes next: it changes e and b, so the parameters are written after it."""
        return not averages_next(self.settings, state, trip.bucket_state)
