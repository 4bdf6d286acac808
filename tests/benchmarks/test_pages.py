"""Tables in pages are what their commands write, and have their places."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import nodes_model
from benchmarks.pages import fill, table
from benchmarks.paper import page
from benchmarks.paper.comparison import RESULTS, load_runs, report


def test_a_table_goes_to_its_place(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- a: begin -->\nold\n<!-- a: end -->\nafter\n")
    fill(path, "a", table(["x", "y"], [["1", "2"]]))
    assert path.read_text() == (
        "before\n<!-- a: begin -->\n| x | y |\n| --- | --- |\n| 1 | 2 |\n<!-- a: end -->\nafter\n"
    )
    with pytest.raises(ValueError, match="no place 'b'"):
        fill(path, "b", "")


def test_pages_are_up_to_date() -> None:
    """Whoever commits runs, or fits the model anew, writes the tables anew."""
    runs = load_runs(RESULTS)
    written = page.PAGE.read_text()
    for make in (page.losses, page.periods, page.decoder):
        assert make(runs) in written
    lines = report(runs, load_runs(RESULTS, unfinished=True))
    assert (RESULTS / "summary.txt").read_text().splitlines() == list(lines)
    assert nodes_model.prediction() in nodes_model.PAGE.read_text()
