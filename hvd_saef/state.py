"""x, e and s, bucket by bucket, and what of them goes into and comes out of a state dict. Local."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_saef.layout import Bucket, Layout, Part, Slot
from hvd_saef.settings import Settings


@dataclass
class BucketState:
    """One bucket's x, e and s, flat; and which of its blocks this worker is the server of."""

    bucket: Bucket
    x: Tensor
    """The consensus point, [numel]: the same bits on every worker."""
    e: Tensor
    """This worker's error, [numel]."""
    s: Tensor | None
    """The server's error for `parts[mine]`; None with single-way compression."""
    parts: list[Part]
    """The servers' shares: one for every worker if the server is sharded, else the whole bucket."""
    mine: int
    """The part that this worker serves."""

    @property
    def sharded(self) -> bool:
        """Whether other workers serve other parts."""
        return len(self.parts) > 1


class State:
    """The state of all buckets. `rounds` is t, the number of completed rounds."""

    def __init__(self, layout: Layout, settings: Settings, rank: int, workers: int) -> None:
        self.layout = layout
        self.settings = settings
        self.rounds = 0
        self.buckets: list[BucketState] = []
        for bucket in layout.buckets:
            sharded = settings.sharded(workers) and not bucket.dense and workers > 1
            parts = bucket.parts(workers if sharded else 1)
            mine = rank if sharded else 0
            served = parts[mine].stop - parts[mine].start
            s = bucket.new_flat()[:served].clone() if settings.double_compression else None
            self.buckets.append(BucketState(bucket, bucket.new_flat(), bucket.new_flat(), s, parts, mine))

    @torch.no_grad()
    def anchor(self) -> None:
        """Take x from the parameters and clear all errors."""
        for state in self.buckets:
            if state.bucket.parameters:
                torch._foreach_copy_(state.bucket.views(state.x), state.bucket.parameters)
            state.e.zero_()
            if state.s is not None:
                state.s.zero_()

    @torch.no_grad()
    def show(self, state: BucketState, flat: Tensor) -> None:
        """Write `flat` into the parameters of one bucket, rounded to their dtype."""
        if state.bucket.parameters:
            torch._foreach_copy_(state.bucket.parameters, state.bucket.views(flat))

    def show_x(self) -> None:
        """Write x into the parameters."""
        for state in self.buckets:
            self.show(state, state.x)

    def views_of(self, which: str) -> dict[str, Tensor]:
        """`"x"` or `"e"` of every parameter, by name and in its shape: views."""
        return {
            slot.name: slot.view(getattr(state, which))
            for state in self.buckets
            for slot in state.bucket.slots
        }

    def error_norms(self) -> tuple[float, float]:
        """Euclidean norms of this worker's e and of the s that it holds."""
        e = [state.e for state in self.buckets]
        s = [state.s for state in self.buckets if state.s is not None]
        return _norm(e), _norm(s)

    def export(self) -> dict[str, Any]:
        """Copies of t, x, e and s as plain tensors by parameter name.

        x and errors have the parameter's shape. A server error is {"start", "values"}: the served
        stretch of the parameter's flat memory, from element `start`.
        """
        server: dict[str, dict[str, Any]] = {}
        for state in self.buckets:
            if state.s is None:
                continue
            part = state.parts[state.mine]
            for slot in state.bucket.slots:
                first, last = max(slot.start, part.start), min(slot.stop, part.stop)
                if first < last:
                    server[slot.name] = {
                        "start": first - slot.start,
                        "values": state.s[first - part.start : last - part.start].clone(),
                    }
        return {
            "rounds": self.rounds,
            "x": {name: view.clone() for name, view in self.views_of("x").items()},
            "errors": {name: view.clone() for name, view in self.views_of("e").items()},
            "server_errors": server,
        }

    @staticmethod
    def check(saved: Mapping[str, Any], layout: Layout) -> None:
        """Raise ValueError if what :meth:`export` gave does not fit these parameters."""
        for key in ("rounds", "x", "errors", "server_errors"):
            if key not in saved:
                raise ValueError(f"the state under 'hvd_saef' has no {key!r}: it was not saved by hvd_saef.")
        for key in ("x", "errors"):
            _check_tensors(key, saved[key], layout.slots)

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Any]) -> None:
        """The inverse of :meth:`export`, for what :meth:`check` found fitting."""
        for state in self.buckets:
            for slot in state.bucket.slots:
                slot.view(state.x).copy_(saved["x"][slot.name])
                slot.view(state.e).copy_(saved["errors"][slot.name])
            self._restore_server_error(state, saved["server_errors"])
        self.rounds = int(saved["rounds"])

    def _restore_server_error(self, state: BucketState, saved: Mapping[str, Mapping[str, Any]]) -> None:
        if state.s is None:
            return
        state.s.zero_()
        part = state.parts[state.mine]
        for slot in state.bucket.slots:
            piece = saved.get(slot.name)
            if piece is None:
                continue
            begin = slot.start + int(piece["start"])
            first, last = max(begin, part.start), min(begin + piece["values"].numel(), part.stop)
            if first < last:
                values = piece["values"][first - begin : last - begin]
                state.s[first - part.start : last - part.start].copy_(values)


def _norm(tensors: list[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tensors))


def _check_tensors(key: str, saved: Mapping[str, Tensor], slots: list[Slot]) -> None:
    names = {slot.name for slot in slots}
    if names != set(saved):
        odd = sorted(names.symmetric_difference(saved))[0]
        where = "the state dict" if odd in saved else "the optimizer"
        raise ValueError(f"the loaded hvd_saef state does not fit: {key} of {odd!r} is in {where} only.")
    for slot in slots:
        if saved[slot.name].shape != slot.parameter.shape:
            raise ValueError(
                f"the loaded hvd_saef state does not fit: {key} of {slot.name!r} has shape "
                f"{tuple(saved[slot.name].shape)}, the parameter {tuple(slot.parameter.shape)}."
            )
