"""A command like `make test-gpu` whose pieces fail: one ends with an exception, and one never."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from benchmarks.gpu.pieces import Command, Piece, Place, Row
from tests.gpu.__main__ import line, table


def fails(place: Place) -> Iterator[Row]:
    """Finds one thing, and then fails."""
    yield {"check": "one", "outcome": "passed", "seconds": 0.0, "detail": ""}
    raise OSError("the disk is gone")


def hangs(place: Place) -> Iterator[Row]:
    """Never ends."""
    yield {"check": "two", "outcome": "passed", "seconds": 0.0, "detail": ""}
    time.sleep(1e6)


PIECES = [Piece("fails", 1e6, fails), Piece("hangs", 1.0, hangs)]

COMMAND = Command("tests.gpu.broken", "", PIECES, "broken", table, line)

if __name__ == "__main__":
    sys.exit(COMMAND.main())
