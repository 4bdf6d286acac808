"""python -m tests.machine: see hours."""

import sys

from tests.machine.hours import main

if __name__ == "__main__":  # spawned processes import this module's neighbours, not this
    sys.exit(main())
