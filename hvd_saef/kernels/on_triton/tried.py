"""Importing this module raises ImportError if Triton is older than those that were tried. Local.

An older Triton comes with an older torch, and may give other bits. The package imports this module first.
"""

import re

import triton

OLDEST = (3, 6)

if tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2]) < OLDEST:
    oldest = ".".join(map(str, OLDEST))
    raise ImportError(f"Triton {triton.__version__} is older than {oldest}, the oldest tried")
