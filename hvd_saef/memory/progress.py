"""How far training is: rounds, and local steps since the last. Local."""

from __future__ import annotations


class Progress:
    """The one place that says how far an optimizer's training is. Only these methods change it."""

    def __init__(self) -> None:
        self._rounds = self._local_steps_done = 0

    @property
    def rounds(self) -> int:
        """t: completed rounds, warm-up rounds included."""
        return self._rounds

    @property
    def local_steps_done(self) -> int:
        """Local steps since the round began; above 0 the training point is the one reached, not b."""
        return self._local_steps_done

    def took_step(self) -> None:
        """A local step was taken on all workers."""
        self._local_steps_done += 1

    def completed_round(self) -> None:
        """The updates of the local steps are in x."""
        self._rounds += 1
        self._local_steps_done = 0

    def undid_steps(self) -> None:
        """The parameters are where the round began."""
        self._local_steps_done = 0

    def restored(self, rounds: int = 0, local_steps_done: int = 0) -> None:
        """Training goes on from a saved state; or from its start."""
        self._rounds, self._local_steps_done = rounds, local_steps_done
