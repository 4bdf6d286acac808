"""With overlap=True: the gradients that the next backward passes will give, and failures so far. Local."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hvd_saef import kernels
from hvd_saef.memory.state import BucketState, State
from hvd_saef.round.gradients import values
from hvd_saef.round.partial_steps import LocalStep, Options, changed_option, options_of
from hvd_saef.round.team_means import TeamMean
from hvd_saef.transport.streams import Sources


@dataclass
class Armed:
    """Holds what a round's last local step still waits for, what has left early, and what went wrong."""

    state: State
    local_step: LocalStep
    passes: int
    expected: deque[tuple[BucketState, dict[Tensor, int]]]
    """The buckets that have not left, in the order of sending, each with the passes left per parameter."""
    watched: set[Tensor] = field(default_factory=set)
    """The parameters whose gradients are expected. Parameters that were unfrozen since are not among them."""
    sources: Sources = field(default_factory=Sources)
    """Where gradients are computed: each parameter's in the stream of its first forward pass."""
    means: deque[tuple[BucketState, TeamMean]] = field(default_factory=deque)
    """The buckets whose gradients are being averaged over the team, or are averaged but not yet used."""
    used: dict[Tensor, tuple[Tensor, int]] = field(default_factory=dict)
    """For each parameter, the gradient that a local step or a mean uses, and the gradient's version."""
    options: Options | None = None
    """The options of the parameter groups that the early local steps use; None before the first one."""
    failure: Exception | None = None
    """The exception that step() is to raise."""
    nonfinite: bool = False
    """True if a gradient held NaN or infinity."""
    overflowed: bool = False
    """True if a local step left NaN, infinity or a value near overflow in a parameter."""
    waits: bool | None = None
    """True if no bucket leaves early: step() must first lay out unfrozen parameters, or there are step hooks.

    None until the first gradient of the round, which decides.
    """

    def look(self, gradients: Iterable[Tensor]) -> None:
        """Sets `nonfinite` if any of these gradients holds NaN or infinity."""
        self.nonfinite = self.nonfinite or not kernels.all_finite([values(g) for g in gradients])

    def note_options(self, groups: Iterable[dict[str, Any]]) -> None:
        """Sets `failure` if the options of `groups` differ from those that earlier local steps used.

        All buckets of one step must use the same options, and step() must find these options unchanged.
        """
        now = options_of(groups)
        if self.options is None:
            self.options = now
        changed = changed_option(self.options, now)
        if changed is not None:
            self.failure = self.failure or RuntimeError(
                f"the option {changed!r} of a parameter group was changed between backward and step(), but "
                "overlap=True had taken local steps with what it was: change it before the forward pass or "
                "after step(), or pass overlap=False."
            )
