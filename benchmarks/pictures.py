"""Plots as small files, so that a page in git can show one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

DOTS_AN_INCH = 80
COLOURS = 40


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG of few colours, and close the figure."""
    from matplotlib import pyplot
    from PIL import Image

    whole = io.BytesIO()
    figure.savefig(whole, format="png", dpi=DOTS_AN_INCH)
    pyplot.close(figure)
    Image.open(whole).convert("RGB").quantize(COLOURS).save(path, optimize=True)
