"""A worker's wish to stop after a step, and whether all workers know of one: for GracefulStop. Local."""

from __future__ import annotations


class Stopping:
    """One writer for both: a signal handler asks, and each step tells what everyone's words said."""

    def __init__(self) -> None:
        self._wanted = self._agreed = False

    @property
    def wanted(self) -> bool:
        """Whether this worker asks to stop: its next word says so."""
        return self._wanted

    @property
    def agreed(self) -> bool:
        """Whether some worker's word asked to stop: all workers know it since the same step."""
        return self._agreed

    def ask(self) -> None:
        """Let this worker's next word ask all workers to stop."""
        self._wanted = True

    def heard(self, someone_asks: bool) -> None:
        """Note what everyone's words together said."""
        self._agreed = self._agreed or someone_asks

    def forget(self) -> None:
        """Begin anew: nobody has asked."""
        self._wanted = self._agreed = False
