"""The file name of the kernels' library, and the digest of its sources. setup.py uses this module too."""

import hashlib
from pathlib import Path

LIBRARY = "libhvd_saef_kernels.so"


def digest(csrc: Path) -> str:
    """Returns a hash, 32 hexadecimal digits, of the C++ sources (names and contents) in folder `csrc`."""
    every = hashlib.sha256()
    for path in sorted([*csrc.glob("*.cpp"), *csrc.glob("*.h")]):
        every.update(path.name.encode() + b"\0" + path.read_bytes())
    return every.hexdigest()[:32]
