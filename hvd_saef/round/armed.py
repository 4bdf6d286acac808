"""With overlap=True: what is expected of the next backward passes, and what went wrong so far. Local."""

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


@dataclass
class Armed:
    """What is expected of the next backward passes."""

    state: State
    local_step: LocalStep
    passes: int
    expected: deque[tuple[BucketState, dict[Tensor, int]]]
    """The buckets that have not left, in their order; for each parameter the passes still to come."""
    watched: set[Tensor] = field(default_factory=set)
    """The parameters whose gradients are expected; another may have been unfrozen since."""
    means: deque[tuple[BucketState, TeamMean]] = field(default_factory=deque)
    """Of the buckets that have left for their ranks' mean and not been seen since."""
    used: dict[Tensor, tuple[Tensor, int]] = field(default_factory=dict)
    """By parameter the gradient that a local step or a mean uses, and its version."""
    options: Options | None = None
    """Those of the parameter groups that the local steps used, once one was taken."""
    failure: Exception | None = None
    """What step() is to raise."""
    nonfinite: bool = False
    """Whether a gradient held a NaN or an infinity."""
    overflowed: bool = False
    """Whether a local step made such a number."""
    waits: bool | None = None
    """Whether all is left to step(), which takes unfrozen parameters in; known from the first gradient on."""

    def look(self, gradients: Iterable[Tensor]) -> None:
        """See whether these gradients are finite."""
        self.nonfinite = self.nonfinite or not kernels.all_finite([values(g) for g in gradients])

    def note_options(self, groups: Iterable[dict[str, Any]]) -> None:
        """All buckets' local steps must take the same options, and step() must find them: or it raises."""
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
