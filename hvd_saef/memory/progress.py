"""Counts how far training has come: completed rounds, and local steps since the last round. Local."""

from __future__ import annotations


class Progress:
    """Holds how far an optimizer's training has come. Only the methods below change it."""

    def __init__(self) -> None:
        self._rounds = self._local_steps_done = 0

    @property
    def rounds(self) -> int:
        """The number t of completed rounds, warm-up rounds included."""
        return self._rounds

    @property
    def local_steps_done(self) -> int:
        """The number of local steps since the round began. Above 0, the training point has left b."""
        return self._local_steps_done

    def took_step(self) -> None:
        """Counts a local step, which all workers have taken."""
        self._local_steps_done += 1

    def completed_round(self) -> None:
        """Counts a round: x now contains the updates of its local steps."""
        self._rounds += 1
        self._local_steps_done = 0

    def undid_steps(self) -> None:
        """Forgets the local steps: the parameters are back where the round began."""
        self._local_steps_done = 0

    def restored(self, rounds: int = 0, local_steps_done: int = 0) -> None:
        """Sets the progress to a saved state's, or without arguments to the start of training."""
        self._rounds, self._local_steps_done = rounds, local_steps_done
