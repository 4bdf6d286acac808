"""Tables in pages are what their commands write, and have their places; pictures are few and small."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks import arguments, nodes_model
from benchmarks.pages import fill, table
from benchmarks.paper import page
from benchmarks.paper.comparison import RESULTS, load_runs, report
from hvd_saef.settings import Settings
from tests.mpi.launch import ROOT

PAGES = (
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "launch/README.md", "benchmarks/paper/README.md")
    ),
    *sorted((ROOT / "docs").glob("*.md")),
)
MOST_BYTES = 60_000
"""Of a picture in git, where each drawing of it stays for ever."""


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
    assert arguments.rows() in arguments.PAGE.read_text()


def test_every_argument_is_described_once() -> None:
    accepted = {argument.name: argument.default for argument in arguments.arguments()}
    assert list(arguments.described()) == list(accepted)
    assert all(len(text) > 8 for text in arguments.described().values())
    for setting in dataclasses.fields(Settings):
        assert accepted[setting.name] == setting.default


def shown(page: Path) -> list[Path]:
    """The pictures that a page shows."""
    return [page.parent / name for name in re.findall(r"!\[[^]]*\]\(([^):]+)\)", page.read_text())]


def test_a_page_shows_one_small_picture_and_no_other_is_kept() -> None:
    pictures = {page: shown(page) for page in PAGES}
    assert sum(map(len, pictures.values())) >= 3
    assert all(len(found) <= 1 for found in pictures.values()), pictures
    of_pages = {path.resolve() for found in pictures.values() for path in found}
    assert all(path.stat().st_size < MOST_BYTES for path in of_pages)
    folders = (ROOT / "docs", ROOT / "benchmarks" / "results", RESULTS)
    assert {path for folder in folders for path in folder.rglob("*.png")} == of_pages


def test_what_contributing_names_is_there() -> None:
    """Files by their names, and functions and classes that stand next to a file."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tracked = [path for folder in ("hvd_saef", "tests", "examples") for path in (ROOT / folder).rglob("*.py")]
    files = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", text))
    assert len(files) > 15
    assert [file for file in files if not any(str(path).endswith(f"/{file}") for path in tracked)] == []
    named = re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)` in `([a-z_/]+\.py)`", text)
    assert len(named) > 4
    for name, file in named:
        source = (ROOT / "hvd_saef" / file).read_text()
        assert all(re.search(rf"(?:def|class) {part}\b", source) for part in name.split(".")), (name, file)
