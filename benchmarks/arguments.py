"""Writes the README's table of arguments, out of the signature and the docstring of DistributedOptimizer.

    python -m benchmarks.arguments

The docstring is where an argument is described; the README shows what is there.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import hvd_saef
from benchmarks.pages import fill, table

PAGE = Path(__file__).resolve().parents[1] / "README.md"
PLACE = "arguments"
MEBIBYTE = 1 << 20


def described() -> dict[str, str]:
    """What the docstring says of each argument, in one line each."""
    documentation = inspect.getdoc(hvd_saef.DistributedOptimizer) or ""
    section = documentation.partition("\nArgs:\n")[2].partition("\n\n")[0]
    parts = re.split(r"(?m)^    (?=\w+: )", section)[1:]
    return {name: " ".join(text.split()) for name, _, text in (part.partition(": ") for part in parts)}


def arguments() -> list[inspect.Parameter]:
    """All arguments, in their order."""
    return list(inspect.signature(hvd_saef.DistributedOptimizer).parameters.values())


def shown(default: Any) -> str:
    """A default as the table has it."""
    if isinstance(default, hvd_saef.Compressor):
        return f"`{default.call.removeprefix('hvd_saef.')}`"
    if isinstance(default, int) and default >= MEBIBYTE:
        return f"{default // MEBIBYTE} MiB"
    return f"`{default!r}`".replace("'", '"')


def rows() -> str:
    """The table of `compression` and of all arguments that Horovod's function does not have."""
    texts = described()
    ours = [one for one in arguments() if one.kind is one.KEYWORD_ONLY or one.name == "compression"]
    return table(
        ["argument", "default", "what it does"],
        [[f"`{one.name}`", shown(one.default), texts[one.name]] for one in ours],
    )


def main() -> None:
    """Write the table into the README."""
    fill(PAGE, PLACE, rows())


if __name__ == "__main__":
    main()
