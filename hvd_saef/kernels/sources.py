"""What the kernels' library is called, and of which sources it was built. setup.py reads it too."""

import hashlib
from pathlib import Path

LIBRARY = "libhvd_saef_kernels.so"


def digest(csrc: Path) -> str:
    """A word for what lies in the folder of the C++ sources."""
    every = hashlib.sha256()
    for path in sorted([*csrc.glob("*.cpp"), *csrc.glob("*.h")]):
        every.update(path.name.encode() + b"\0" + path.read_bytes())
    return every.hexdigest()[:32]
