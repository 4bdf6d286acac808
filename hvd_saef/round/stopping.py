"""A worker's request to stop after a step, and the workers' common knowledge of it. Local.

GracefulStop uses it.
"""

from __future__ import annotations


class Stopping:
    """Holds the request and the answer, as their only writer.

    A signal handler calls :meth:`ask`, and each step calls :meth:`heard`.
    """

    def __init__(self) -> None:
        self._wanted = self._agreed = False

    @property
    def wanted(self) -> bool:
        """True if this worker asks to stop; its next word reports the request."""
        return self._wanted

    @property
    def agreed(self) -> bool:
        """True if some worker's word asked to stop; all workers learn it in the same step."""
        return self._agreed

    def ask(self) -> None:
        """Lets this worker's next word ask all workers to stop."""
        self._wanted = True

    def heard(self, someone_asks: bool) -> None:
        """Notes if any word of the step asked to stop."""
        self._agreed = self._agreed or someone_asks

    def forget(self) -> None:
        """Clears the request and the answer."""
        self._wanted = self._agreed = False
