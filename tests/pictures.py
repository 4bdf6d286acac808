"""Whether a plot shows anything."""

from __future__ import annotations

from pathlib import Path


def coloured_pixels(path: Path) -> int:
    """The number of a picture's pixels that are not grey: axes and text alone have none."""
    from PIL import Image

    with Image.open(path) as picture:
        colours = picture.convert("RGB").getcolors(1 << 24) or []
    return sum(number for number, colour in colours if max(colour) - min(colour) > 60)
