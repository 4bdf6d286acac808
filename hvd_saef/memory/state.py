"""x, e and s of all buckets, and how a state dict exports and restores them. Local."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvd_saef.compression import Memory
from hvd_saef.memory import algorithm
from hvd_saef.memory.layout import Bucket, Layout, Part, is_gapless
from hvd_saef.memory.progress import Progress
from hvd_saef.settings import Settings


@dataclass
class BucketState:
    """One bucket's x, e and s as flat tensors, and the part of the bucket that this worker serves."""

    bucket: Bucket
    x: Tensor
    """The consensus point, [numel]; it has the same bits on every worker."""
    e: Tensor
    """This worker's error, [numel]."""
    s: Tensor | None
    """The server's error for `parts[mine]`, flat; None with single-way compression."""
    parts: list[Part]
    """The servers' parts: worker k serves part k of a sharded server; else the only part is the bucket."""
    mine: int
    """The index of the part that this worker serves."""
    _where: Any = None
    _memories: list[Memory] = field(default_factory=list)

    @property
    def sharded(self) -> bool:
        """True if other workers serve other parts of the bucket."""
        return len(self.parts) > 1

    def start_point(self, alpha: float, beta: float, s: Tensor | None) -> Tensor:
        """Returns b of row 2, [numel], in new memory, rounded to the parameters' dtypes."""
        b = algorithm.step_ahead(self.x, self.e, s, alpha, beta)
        for slot in self.bucket.slots:
            if slot.parameter.dtype != b.dtype:
                view = slot.view(b)
                view.copy_(view.to(slot.parameter.dtype))
        return b

    @torch.no_grad()
    def show(self, flat: Tensor) -> None:
        """Writes `flat` ([numel]) into the parameters, rounded to their dtypes."""
        if self.bucket.parameters:
            torch._foreach_copy_(self.bucket.parameters, self.bucket.views(flat))

    def memories(self, parts: Sequence[Part], alpha: float, beta: float, narrow: bool) -> list[Memory]:
        """Returns a Memory for each of `parts`, in their order, for one pass over each part.

        The parameters' own memory is part of it if all are gapless, and of x's dtype unless `narrow`. The
        list is cached, and made anew if a parameter's memory or the number of parts has changed.
        """
        where = [(p.data_ptr(), p.dtype, p.stride()) for p in self.bucket.parameters], len(parts), narrow
        if where != self._where:
            self._where, self._memories = where, []
            for part, pieces in zip(parts, _cut(self._points(narrow), parts), strict=True):
                stretch = slice(part.start, part.stop)
                s = self.s if beta else None  # β > 0 needs a replicated server, which has one part
                self._memories.append(
                    Memory(part.blocks, self.x[stretch], self.e[stretch], s, pieces, alpha, beta, part.start)
                )
        return self._memories

    def _points(self, narrow: bool) -> list[Tensor]:
        """Returns the parameters' own memory, 1-D, end to end; [] unless all are gapless and of x's dtype.

        With `narrow`, they may be float16 and bfloat16 too.
        """
        parameters = self.bucket.parameters
        if not all((narrow or p.dtype == self.bucket.dtype) and is_gapless(p) for p in parameters):
            return []
        return [p.detach().as_strided((p.numel(),), (1,)) for p in parameters]

    @torch.no_grad()
    def anchor(self) -> None:
        """Takes x from the parameters and sets the errors to zero."""
        if self.bucket.parameters:
            torch._foreach_copy_(self.bucket.views(self.x), self.bucket.parameters)
        self.e.zero_()
        if self.s is not None:
            self.s.zero_()


class State:
    """The x, e and s of all buckets, and the training's progress."""

    def __init__(
        self, layout: Layout, settings: Settings, worker: int, workers: int, progress: Progress
    ) -> None:
        self.layout = layout
        self.settings = settings
        self.progress = progress
        self.buckets: list[BucketState] = []
        self._worker, self._workers = worker, workers
        self._loads = [0] * workers
        for bucket in layout.buckets:
            self._add(bucket)

    @property
    def rounds(self) -> int:
        """The number t of completed rounds."""
        return self.progress.rounds

    def _add(self, bucket: Bucket) -> BucketState:
        workers = self._workers
        sharded = self.settings.sharded(workers) and not bucket.dense and workers > 1
        parts = _assign(bucket.parts(workers), self._loads) if sharded else bucket.parts(1)
        mine = self._worker if sharded else 0
        served = parts[mine].stop - parts[mine].start
        s = bucket.new_flat()[:served].clone() if self.settings.double_compression else None
        self.buckets.append(BucketState(bucket, bucket.new_flat(), bucket.new_flat(), s, parts, mine))
        return self.buckets[-1]

    def grow(self, layout: Layout) -> None:
        """Adds the buckets of `layout` that are not here yet, and takes their x from their parameters."""
        for bucket in layout.buckets[len(self.buckets) :]:
            self._add(bucket).anchor()
        self.layout = layout

    def anchor(self) -> None:
        """Takes x from the parameters and sets all errors to zero."""
        for bucket_state in self.buckets:
            bucket_state.anchor()

    def shows_x(self) -> bool:
        """Returns True if the parameters hold x, rounded to their dtypes."""
        return all(
            torch.equal(view.to(parameter.dtype), parameter)
            for bucket_state in self.buckets
            for view, parameter in zip(
                bucket_state.bucket.views(bucket_state.x), bucket_state.bucket.parameters, strict=True
            )
        )

    def show_x(self) -> None:
        """Writes x into the parameters, rounded to their dtypes."""
        for bucket_state in self.buckets:
            bucket_state.show(bucket_state.x)

    def views_of(self, which: str) -> dict[str, Tensor]:
        """Returns x or e (`which` is "x" or "e") of each parameter, by name: views in its shape."""
        return {
            slot.name: slot.view(getattr(bucket_state, which))
            for bucket_state in self.buckets
            for slot in bucket_state.bucket.slots
        }

    def own(self) -> dict[str, Tensor]:
        """Returns what only this worker has, by its title in messages: views of e, and the s served here."""
        own = {f"the error of {name!r}": view for name, view in self.views_of("e").items()}
        served = {
            f"the server's error {bucket_state.bucket.index}": bucket_state.s
            for bucket_state in self.buckets
            if bucket_state.s is not None
        }
        return own | served

    def error_norms(self) -> tuple[float, float]:
        """Returns the Euclidean norms of this worker's e and of the s that this worker holds."""
        e = [bucket_state.e for bucket_state in self.buckets]
        s = [bucket_state.s for bucket_state in self.buckets if bucket_state.s is not None]
        return _norm(e), _norm(s)

    def export(self) -> dict[str, Any]:
        """Returns t and copies of x, e and s, as plain tensors by parameter name.

        x and errors have the parameter's shape. A server error is {"start", "values"}: the stretch of the
        parameter's flat memory that this worker serves, which begins at element `start`.
        """
        server: dict[str, Any] = {}
        for bucket_state in self.buckets:
            if bucket_state.s is not None:
                server |= cut_stretches(
                    bucket_state.bucket, bucket_state.s, bucket_state.parts[bucket_state.mine].start
                )
        return {
            "rounds": self.rounds,
            "x": {name: view.clone() for name, view in self.views_of("x").items()},
            "errors": {name: view.clone() for name, view in self.views_of("e").items()},
            "server_errors": server,
        }

    @staticmethod
    def is_in(saved: Mapping[str, Any]) -> bool:
        """Returns True if `saved` holds any key that :meth:`export` returns."""
        return any(key in saved for key in EXPORTED)

    @staticmethod
    def check(saved: Mapping[str, Any], layout: Layout) -> None:
        """Raises ValueError if `saved`, which :meth:`export` returned, does not fit the parameters."""
        for key in EXPORTED:
            if key not in saved:
                raise misfit(f"it has no {key!r}")
        for key in ("x", "errors"):
            check_shapes(key, saved[key], layout)
        slots = {slot.name: slot for slot in layout.slots}
        for name, piece in saved["server_errors"].items():
            if (
                name not in slots
                or int(piece["start"]) + piece["values"].numel() > slots[name].parameter.numel()
            ):
                raise misfit(f"the server's error of {name!r} is larger than the parameter")

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Any]) -> bool:
        """Takes x, e and s from `saved`, which :meth:`check` has accepted.

        Sets s to zero where `saved` lacks it. Returns True if `saved` had all of the s that is served here.
        """
        found = 0
        for bucket_state in self.buckets:
            for slot in bucket_state.bucket.slots:
                slot.view(bucket_state.x).copy_(saved["x"][slot.name])
                slot.view(bucket_state.e).copy_(saved["errors"][slot.name])
            if bucket_state.s is not None:
                part = bucket_state.parts[bucket_state.mine]
                found += place_stretches(
                    bucket_state.bucket, saved["server_errors"], bucket_state.s.zero_(), part.start
                )
        return found == sum(
            bucket_state.s.numel() for bucket_state in self.buckets if bucket_state.s is not None
        )

    def clear_errors(self) -> None:
        """Sets this worker's e to zero."""
        for bucket_state in self.buckets:
            bucket_state.e.zero_()

    def scale_errors(self, factor: float) -> None:
        """Multiplies this worker's e by `factor`, in place."""
        for bucket_state in self.buckets:
            bucket_state.e.mul_(factor)


def place_stretches(bucket: Bucket, stretches: Mapping[str, Any], out: Tensor, start: int) -> int:
    """Copies the values of `stretches` into `out`, which is the bucket's memory from element `start` on.

    `stretches` are the "server_errors" of :meth:`State.export`. Returns the number of elements found;
    the other elements of `out` keep their values.
    """
    found = 0
    for slot in bucket.slots:
        if slot.name in stretches:
            values = stretches[slot.name]["values"]
            begin = slot.start + int(stretches[slot.name]["start"])
            first, last = max(begin, start), min(begin + values.numel(), start + out.numel())
            if first < last:
                out[first - start : last - start].copy_(values[first - begin : last - begin])
                found += last - first
    return found


def cut_stretches(bucket: Bucket, values: Tensor, start: int) -> dict[str, Any]:
    """Returns copies of `values`, the bucket's memory from element `start` on, by parameter.

    The inverse of :func:`place_stretches`.
    """
    stretches: dict[str, Any] = {}
    for slot in bucket.slots:
        first, last = max(slot.start, start), min(slot.stop, start + values.numel())
        if first < last:
            stretches[slot.name] = {
                "start": first - slot.start,
                "values": values[first - start : last - start].clone(),
            }
    return stretches


def _cut(pieces: Sequence[Tensor], parts: Sequence[Part]) -> Iterator[list[Tensor]]:
    """Yields for each part what lies in it of the `pieces`, which are one memory, end to end."""
    starts = list(itertools.accumulate((piece.numel() for piece in pieces), initial=0))
    for part in parts:
        inside = []
        for i in range(bisect.bisect_right(starts, part.start) - 1, len(pieces)):
            if starts[i] >= part.stop:
                break
            piece = pieces[i][max(0, part.start - starts[i]) : part.stop - starts[i]]
            if piece.numel():
                inside.append(piece)
        yield inside


def _assign(parts: list[Part], loads: list[int]) -> list[Part]:
    """Returns the parts in the workers' order; the worker that serves least so far gets the largest.

    `loads` holds the elements that each worker serves, and is increased in place. Blocks are not cut, so the
    parts of one bucket may be uneven.
    """
    workers = sorted(range(len(parts)), key=lambda worker: loads[worker])
    assigned = dict(zip(workers, sorted(parts, key=lambda part: part.start - part.stop), strict=True))
    for worker, part in assigned.items():
        loads[worker] += part.stop - part.start
    return [assigned[worker] for worker in range(len(parts))]


EXPORTED = ("rounds", "x", "errors", "server_errors")


def misfit(reason: str) -> ValueError:
    """Returns the error that says why a loaded state cannot be taken."""
    return ValueError(f"the loaded state under 'hvd_saef' does not fit: {reason}.")


def check_shapes(what: str, saved: Mapping[str, Tensor], layout: Layout) -> None:
    """Raises ValueError unless `saved` has one tensor of the right shape for every parameter, by name."""
    shapes = {slot.name: tuple(slot.parameter.shape) for slot in layout.slots}
    if set(shapes) != set(saved):
        odd = min(set(shapes).symmetric_difference(saved))
        where = "the state dict" if odd in saved else "the optimizer"
        raise misfit(f"{what} of {odd!r} is in {where} only")
    for name, shape in shapes.items():
        if tuple(saved[name].shape) != shape:
            raise misfit(f"{what} of {name!r} has shape {tuple(saved[name].shape)}, the parameter {shape}")


def _norm(tensors: list[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tensors))
