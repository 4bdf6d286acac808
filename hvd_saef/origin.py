"""Where x, e and s come from: at the first step, after loading, and on reanchor()."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_saef.agreement import check_configuration, check_consensus
from hvd_saef.communicator import Communicator
from hvd_saef.errors import ConfigurationMismatchError
from hvd_saef.layout import Layout
from hvd_saef.modes import Modes
from hvd_saef.settings import Settings
from hvd_saef.state import State

BROADCAST_ADVICE = (
    "All workers must start from the same parameters: call hvd.broadcast_parameters(model.state_dict(), "
    "root_rank=0) before the first step."
)
VERSION = 1


class Origin:
    """Takes x, e and s into `modes.state`, once all workers have agreed on who was loaded."""

    def __init__(self, communicator: Communicator, settings: Settings, modes: Modes) -> None:
        self.settled = False
        """Whether all workers agreed, since the last wrapping or loading here."""
        self.consolidated = False
        """Whether e is the same on all workers, so that one worker's state is everyone's."""
        self._loaded = False
        self._points: list[Tensor] | None = None
        self._communicator = communicator
        self._settings = settings
        self._modes = modes

    # -- at the first step after wrapping or loading, collective --------------------------------------

    def settle(self, layout: Layout, kept: Layout) -> None:
        """Agree who was loaded, and take x, e and s accordingly. Collective.

        `layout` is what workers must agree on; `kept` what of it has x and errors of its own.
        """
        check_configuration(self._communicator, layout)
        rounds = self._modes.state.rounds if self._modes.state else 0
        mine = (self._loaded, rounds, self._modes.local_steps_done, self.consolidated)
        everyone = self._communicator.allgather_object(mine)
        loaded = [rank for rank, (was_loaded, *_) in enumerate(everyone) if was_loaded]
        if not loaded:
            self._take_parameters(kept)
        elif len(loaded) < len(everyone):
            self._take_all_from(loaded[0], kept, rounds=everyone[loaded[0]][1], errors=everyone[loaded[0]][3])
        elif len({counts[1:3] for counts in everyone}) > 1:
            raise ConfigurationMismatchError(
                "workers loaded states of different steps: (rounds, local steps) are "
                f"{[counts[1:3] for counts in everyone]}, by rank. Load the same checkpoint everywhere."
            )
        else:
            self._modes.to_start(self._points)  # the model may have been loaded after the optimizer
        check_consensus(self._communicator, self.x(layout), BROADCAST_ADVICE)
        self._settle()

    def renew(self, layout: Layout, kept: Layout) -> None:
        """Take x from rank 0's parameters as they are, and clear the errors. Collective."""
        check_configuration(self._communicator, layout)
        for slot in layout.slots:
            self._communicator.broadcast(slot.parameter, 0)
        rounds = self._modes.state.rounds if self._modes.state else 0
        self._take_parameters(kept).rounds = rounds
        self._settle()

    def x(self, layout: Layout) -> Mapping[str, Tensor]:
        """The consensus point by parameter name: views. The parameters, where no other x is kept."""
        kept = self._modes.state.views_of("x") if self._modes.state else {}
        return kept or {slot.name: slot.parameter for slot in layout.slots}

    def _settle(self) -> None:
        self.settled, self._loaded, self._points = True, False, None

    def _take_parameters(self, kept: Layout) -> State:
        state = self._modes.state or State(
            kept, self._settings, self._communicator.rank, self._communicator.size
        )
        state.anchor()
        self._modes.state, self._modes.local_steps_done = state, 0
        return state

    def _take_all_from(self, root: int, kept: Layout, rounds: int, errors: bool) -> None:
        """Only some workers were loaded: take x, s and t of worker `root`; its e too if it is everyone's."""
        state = self._modes.state or self._take_parameters(kept)
        for bucket in state.buckets:
            self._communicator.broadcast(bucket.x, root)
            if errors:
                self._communicator.broadcast(bucket.e, root)
            else:
                bucket.e.zero_()
            if bucket.s is not None and bucket.sharded:
                bucket.s.zero_()
            elif bucket.s is not None:
                self._communicator.broadcast(bucket.s, root)
        state.rounds = rounds
        self._modes.local_steps_done = 0
        self._modes.to_start()
        lost = [] if errors else ["the workers' errors"]
        if any(bucket.sharded for bucket in state.buckets):
            lost.append("the sharded server's error")
        if lost and state.buckets and self._communicator.rank == 0:
            warnings.warn(
                f"only rank {root} was loaded, and its state does not hold all of {' and '.join(lost)}: "
                "cleared on all workers. Let every rank save and load its own optimizer.state_dict().",
                stacklevel=2,
            )

    # -- state dicts, local ---------------------------------------------------------------------------

    def export(self) -> dict[str, Any]:
        """What stands under "hvd_saef" in the state dict: plain numbers and copies of tensors."""
        exported: dict[str, Any] = {"version": VERSION, "settings": self._settings.describe()}
        exported["consolidated"] = self.consolidated
        exported["local_steps_done"] = self._modes.local_steps_done
        exported["reached"] = self._modes.points()
        return exported | (self._modes.state.export() if self._modes.state else {})

    def check(self, saved: Mapping[str, Any], kept: Layout) -> None:
        """Raise ValueError if `saved` is not a state of ours for these parameters."""
        if saved.get("version") != VERSION:
            raise ValueError(
                f"the state under 'hvd_saef' is of version {saved.get('version')!r}: {VERSION} is allowed."
            )
        if "x" in saved:
            State.check(saved, kept)

    def restore(self, saved: Mapping[str, Any] | None, kept: Layout) -> None:
        """Take what :meth:`export` gave; for None, or what has no x yet, x is taken at the next step."""
        self.settled = False
        self._loaded = saved is not None and "x" in saved
        if saved is None or not self._loaded:
            self._modes.state, self._modes.local_steps_done = None, 0
            self.consolidated, self._points = False, None
            return
        if self._modes.state is None:
            self._modes.state = State(kept, self._settings, self._communicator.rank, self._communicator.size)
        self._modes.state.restore(saved)
        self._modes.local_steps_done = int(saved["local_steps_done"])
        self.consolidated = bool(saved["consolidated"])
        self._points = saved["reached"]
        self._modes.to_start(self._points)


def average_moments(communicator: Communicator, optimizer: torch.optim.Optimizer, layout: Layout) -> None:
    """Replace each floating state tensor of its parameter's shape by the workers' mean. Collective."""
    for slot in layout.slots:
        state = optimizer.state.get(slot.parameter, {})
        mine = [key for key, value in state.items() if _is_moment(value, slot.parameter)]
        theirs = communicator.allgather_object(mine)
        for key in sorted({key for keys in theirs for key in keys}):
            # A worker that has had no gradient yet adds zero, and keeps its empty state.
            moment = state[key] if key in mine else torch.zeros_like(slot.parameter)
            communicator.allreduce_mean(moment, f"state.{slot.name}.{key}")


def _is_moment(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape
