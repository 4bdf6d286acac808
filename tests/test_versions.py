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
<testcase classname="tests.test_b" name="test_five"><error message="no">text</error></testcase>
</testsuite></testsuites>"""


def test_what_a_run_comes_to(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert versions.counts(report) == {
        "passed": 1,
        "failed": ["tests.test_a.test_two", "tests.test_b.test_five"],
        "skipped": {"needs Muon": 2},
    }


def record(torch: str, tests: str = "all", passed: int = 1) -> versions.Record:
    keys = dict.fromkeys(versions.KEYS, "1.0") | {"torch": torch, "tests": tests}
    return keys | {"date": "d", "passed": passed, "failed": ["a.b"], "skipped": {"x|y": 2}}


def test_a_newer_record_of_the_same_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    for one in (
        record("2.10.0"),
        record("2.9.1+cpu"),
        record("2.9.1+cpu", "tests/a"),
        record("2.10.0", passed=5),
    ):
        versions.keep(one, path)
    kept = json.loads(path.read_text())
    assert [(one["torch"], one["tests"], one["passed"]) for one in kept] == [
        ("2.9.1+cpu", "all", 1),
        ("2.9.1+cpu", "tests/a", 1),
        ("2.10.0", "all", 5),
    ]
    assert versions.rows(path).splitlines()[-1] == (
        "| 2.10.0 | 1.0 | 1.0 | 1.0, 1.0 | all | 5 | `a.b` | 2: x\\|y | d |"
    )


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
