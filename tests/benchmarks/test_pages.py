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
HOROVODS_OWN_TESTS = "test/parallel/test_torch.py"
"""The one file of tests that a page names and that is in Horovod's repository, not in this one."""
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


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"(?ms)^```.*?^```", "", text)


def anchors(page: Path) -> set[str]:
    """What links within a page may end with: its headings, as GitHub spells them."""
    heads = re.findall(r"(?m)^#+ (.*)$", prose(page.read_text()))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def missing_tests(text: str) -> list[str]:
    """The tests that a page names and that the tree does not have at that path."""
    names = re.findall(r"[\w/]*\btest_\w+\.py(?:::\w+)?|tests/[\w/]+\.py(?:::\w+)?", text)
    missing = []
    for name in names:
        file, _, function = name.partition("::")
        if file == HOROVODS_OWN_TESTS:
            continue
        source = (ROOT / file).read_text() if (ROOT / file).is_file() else ""
        if not source or (function and not re.search(rf"(?m)^def {function}\(", source)):
            missing.append(name)
    return missing


def missing_files(text: str) -> list[str]:
    """The files and modules of this repository that a page names and that the tree does not have."""
    folders = "tests|benchmarks|examples|launch|docs|hvd_saef"
    paths = re.findall(rf"(?<![\w./-])((?:{folders})/[\w./-]*\w)", text)
    modules = re.findall(rf"python -m ((?:{folders})(?:\.\w+)*)", text)
    of_modules = [(module, ROOT / module.replace(".", "/")) for module in modules]
    return [
        *(path for path in paths if not (ROOT / path).exists()),
        *(name for name, path in of_modules if not (path.is_dir() or path.with_suffix(".py").is_file())),
    ]


def missing_links(page: Path) -> list[str]:
    """The links of a page, to files and to headings, that lead nowhere."""
    missing = []
    for link in re.findall(r"\]\(([^):]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    assert missing_tests(text) == []
    assert missing_files(text) == []
    assert missing_links(page) == []
    if page.name == "horovod.md":
        assert text.count("`tests/") > 50


def test_a_name_that_is_not_there_is_found(tmp_path: Path) -> None:
    assert missing_tests("`test_pages.py`, `tests/benchmarks/test_pages.py::test_none`, `tests/none.py`") == [
        "test_pages.py",
        "tests/benchmarks/test_pages.py::test_none",
        "tests/none.py",
    ]
    assert missing_files("`docs/none.md`, python -m benchmarks.none") == ["docs/none.md", "benchmarks.none"]
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[one](#a-heading) [two](#another) [three](none.md)\n")
    assert missing_links(page) == ["#another", "none.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_rows_have_as_many_cells_as_their_heads(page: Path) -> None:
    cells = 0
    for line in prose(page.read_text()).splitlines():
        found = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert found in (0, cells) or cells == 0, line
        cells = found
