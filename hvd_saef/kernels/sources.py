"""The names of the files that a build of the kernels leaves, and the digest of its sources.

setup.py uses this module too.
"""

import hashlib
from pathlib import Path

LIBRARY = "libhvd_saef_kernels.so"
NOT_BUILT = "not_built.txt"
"""This file is there instead of the library if a build failed: one line that says why."""


def digest(csrc: Path) -> str:
    """Returns a hash, 32 hexadecimal digits, of the C++ sources (names and contents) in folder `csrc`."""
    every = hashlib.sha256()
    for path in sorted([*csrc.glob("*.cpp"), *csrc.glob("*.h")]):
        every.update(path.name.encode() + b"\0" + path.read_bytes())
    return every.hexdigest()[:32]
