"""The table of what was tried is that of its records, and the declared bounds are in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import versions
from tests.mpi.launch import ROOT

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two"><failure message="no">text</failure></testcase>
<testcase classname="tests.test_a" name="test_three"><skipped message="needs Muon">x</skipped></testcase>
<testcase classname="tests.test_a" name="test_four"><skipped message="needs Muon">x</skipped></testcase>
<testcase name="tests.c"><skipped message="collection skipped">('c', 'Skipped: needs a')</skipped></testcase>
<testcase classname="tests.test_b" name="test_five"><error message="no">text</error></testcase>
</testsuite></testsuites>"""


def test_what_a_run_comes_to(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert versions.counts(report) == {
        "passed": 1,
        "failed": ["tests.test_a.test_two", "tests.test_b.test_five"],
        "skipped": {"needs Muon": 2, "needs a": 1},
    }


def record(torch: str, *tests: str, passed: int = 1, date: str = "2026-01-01") -> versions.Record:
    of = dict.fromkeys(versions.VERSIONS, "1.0") | {"torch": torch, "tests": list(tests or ("tests",))}
    return of | {"date": date, "passed": passed, "failed": ["a.b"], "skipped": {"x|y": 2}}


def kept(path: Path, *records: versions.Record) -> list[tuple[str, list[str], int]]:
    for one in records:
        versions.keep(one, path)
    return [(one["torch"], one["tests"], one["passed"]) for one in json.loads(path.read_text())]


def test_a_newer_record_of_the_same_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    records = [record("2.10.0"), record("2.9.1+cpu", "tests/a"), record("2.10.0", passed=5)]
    assert kept(path, *records) == [("2.9.1+cpu", ["tests/a"], 1), ("2.10.0", ["tests"], 5)]
    assert versions.rows(path).splitlines()[-1] == (
        "| 2.10.0 | 1.0 | 1.0 | 1.0, 1.0 | all | 5 | `a.b` | 2: x\\|y | 2026-01-01 |"
    )


def test_pieces_that_share_no_test_are_one_row(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    pieces = [
        record("2.9.1", "tests/a", "tests/b/test_b.py"),
        record("2.9.1", "tests/test_*.py", passed=3, date="2026-01-02"),
        record("2.9.1", "tests/test_a.py", passed=7),
    ]
    assert len(kept(path, *pieces)) == 3
    assert [row.split("|")[5:8] for row in versions.rows(path).splitlines()[2:]] == [
        [" tests/a, tests/b/test_b.py, tests/ (its own files) ", " 4 ", " `a.b`, `a.b` "],
        [" tests/test_a.py ", " 7 ", " `a.b` "],
    ]
    assert versions.rows(path).splitlines()[2].endswith("| 4: x\\|y | 2026-01-02 |")


def test_a_record_goes_when_all_its_tests_ran_again(tmp_path: Path) -> None:
    """In one newer record or in several."""
    path = tmp_path / "records.json"
    assert len(kept(path, record("2.9.1", "tests/a/test_a.py", "tests/b/test_b.py::test_x[tests/c-1]"))) == 1
    assert len(kept(path, record("2.9.1", "tests/a"))) == 2
    assert kept(path, record("2.9.1", "tests/b")) == [
        ("2.9.1", ["tests/a"], 1),
        ("2.9.1", ["tests/b"], 1),
    ]
    assert kept(path, record("2.9.1")) == [("2.9.1", ["tests"], 1)]
    assert len(kept(path, record("2.9.1", "tests/a"))) == 2  # the rest of the older one is not older


def test_records_are_of_tests_that_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        versions.main(["2.3.1", "--record", "--", "tests/a", "-k", "some"])
    assert "no options of pytest's" in capsys.readouterr().err


def mpi(folder: Path, says: str) -> str:
    """A folder of an MPI that says this of itself."""
    folder.mkdir(exist_ok=True)
    for name in ("mpicxx", "mpirun"):
        (folder / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_environments_differ_by_what_they_are_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two MPIs, in two places or of two versions, and of two interpreters of one version."""

    def name(path: str, *without: bool) -> str:
        monkeypatch.setenv("PATH", path)
        return versions.name_of("2.3.1", "1.26.4", *(without or (False,)))

    none = "/nowhere"
    names = [
        name(none),
        name(none, True),
        name(mpi(tmp_path / "a", "MPICH 4")),
        name(mpi(tmp_path / "b", "MPICH 4")),
    ]
    names += [name(mpi(tmp_path / "a", "MPICH 5"))]
    assert name(str(tmp_path / "a")) == names[-1]
    assert name(str(tmp_path / "a"), True) == names[1]  # it has no MPI
    monkeypatch.setattr("sys.prefix", "/site")
    names += [name(none)]
    assert len(set(names)) == len(names) == 6
    assert all(one.startswith("torch2.3.1-py") for one in names)


def test_the_page_has_the_records() -> None:
    assert versions.rows() in versions.PAGE.read_text()


@pytest.mark.parametrize("what", ["torch", "numpy", "Python"])
def test_the_oldest_that_is_allowed_was_tried(what: str) -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf'"{what}>=([\d.]+)"|requires-{what.lower()} = ">=([\d.]+)"', declared)
    assert found
    oldest = found[1] or found[2]
    tried = [one[what] for one in json.loads(versions.RECORDS.read_text())]
    assert any(f"{version}.".startswith(f"{oldest}.") for version in tried), tried
