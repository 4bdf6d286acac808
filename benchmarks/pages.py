"""Tables in Markdown, and their places in pages: between two comments with a name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, len(heads) * ["---"], *rows))


def fill(page: Path, name: str, text: str) -> None:
    """Put `text` into the page's place of that name. Raises ValueError if it has none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text().partition(begin)
    if not found or end not in rest:
        raise ValueError(f"{page} has no place {name!r}: write {begin} and {end} where it is to be.")
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
