"""Runs the tests with a torch of your choice, and writes the table of what was tried.

    python -m tests.versions 2.3.1 --numpy 1.26.4 --record -- tests/kernels
    python -m tests.versions

The first makes an environment of its own for this Python, outside the checkout, or takes the one that it
made before, and runs pytest there. `make test-torch` is the same. The second writes the table into
docs/versions.md, from the records beside it. Needs Python alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import date
from glob import glob
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from benchmarks.pages import fill, table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
RECORDS = ROOT / "docs" / "versions.json"
PLACE = "versions"
WHOLE = ("--ignore=tests/cluster", "tests")
"""What `make test` runs."""
VERSIONS = ("torch", "Python", "numpy", "Horovod", "MPI")
"""What a record is of, beside its tests."""
ASK = """
import importlib.metadata, json, platform
from hvd_saef.doctor import vendors
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
print(json.dumps({"torch": version("torch"), "Python": platform.python_version(), "numpy": version("numpy"),
    "Horovod": version("horovod"), "MPI": vendors.name()}))
"""
Record = dict[str, Any]


def environment(torch: str, numpy: str | None, without_horovod: bool) -> Path:
    """The folder of the environment, which bootstrap.sh has made or found ready."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd_saef"
    folder = cache / "environments" / name_of(torch, numpy, without_horovod)
    if numpy:  # before torch, which takes what is there
        if not folder.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-q", f"numpy=={numpy}"], check=True)
    command = [str(ROOT / "launch" / "bootstrap.sh"), "--venv", str(folder)]
    command += ["--without-horovod"] * without_horovod
    subprocess.run(command, env=os.environ | {"TORCH": torch, "PYTHON": sys.executable}, check=True)
    return folder


def name_of(torch: str, numpy: str | None, without_horovod: bool) -> str:
    """The name of an environment, which differs where what it is made of differs."""
    parts = [f"torch{torch}", f"py{platform.python_version()}"]
    parts += [f"numpy{numpy}"] * bool(numpy) + ["no-horovod"] * without_horovod
    made_of = [sys.prefix]  # two interpreters of one version may have packages of their own
    compiler = None if without_horovod else shutil.which("mpicxx")
    if compiler:  # the MPI that bootstrap.sh builds for; without one it takes its own
        folder = Path(compiler).parent
        launcher = shutil.which("mpirun", path=str(folder))
        said = _said_by(launcher, "--version") if launcher else ""
        made_of += [str(folder.resolve()), said]
    return "-".join([*parts, hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:8]])


def _said_by(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout


def what_is_in(folder: Path) -> Record:
    """The versions in an environment."""
    asked = [str(folder / "bin" / "python"), "-c", ASK]
    said = subprocess.run(asked, env=variables_of(folder), stdout=subprocess.PIPE, check=True).stdout
    found: Record = json.loads(said)
    return found


def variables_of(folder: Path) -> dict[str, str]:
    """The environment variables of what runs in an environment."""
    return os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),  # the environment may know another checkout
        "OMP_NUM_THREADS": "1",
    }


def run(folder: Path, tests: Sequence[str]) -> tuple[int, Record]:
    """The exit code of pytest, and what came of the tests."""
    with TemporaryDirectory() as where:
        report = Path(where) / "report.xml"
        pytest = [str(folder / "bin" / "python"), "-m", "pytest", "-q", "-n", "auto", "--dist", "loadgroup"]
        found = [name for one in tests for name in sorted(glob(one, root_dir=ROOT)) or [one]]
        command = [*pytest, f"--junitxml={report}", *found]
        code = subprocess.run(command, cwd=ROOT, env=variables_of(folder), check=False).returncode
        when = {"date": date.today().isoformat()}
        return code, {"tests": list(tests) if tuple(tests) != WHOLE else ["tests"]} | counts(report) | when


def counts(report: Path) -> Record:
    """How many tests passed and failed, and how many were skipped for which reason, by pytest's report."""
    passed, failed, skipped = 0, [], Counter[str]()
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag: child for child in case}
        if "skipped" in kinds:
            said = kinds["skipped"].get("message", "")
            if said == "collection skipped":  # a whole file, whose reason stands in the text
                said = (kinds["skipped"].text or "").rpartition("Skipped: ")[2].rstrip("')\"")
            skipped[said] += 1
        elif {"failure", "error"} & set(kinds):
            failed.append(f"{case.get('classname')}.{case.get('name')}")
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": dict(sorted(skipped.items()))}


def keep(record: Record, path: Path = RECORDS) -> None:
    """Add a record, in order of versions. Older ones go when all their tests ran again."""
    records: list[Record] = json.loads(path.read_text()) if path.exists() else []
    others = [one for one in records if _versions(one) == _versions(record)]
    for one in others:
        newer = [another for another in others if another is not one and another["date"] >= one["date"]]
        again = [name for another in (record, *newer) for name in another["tests"]]
        if _share_tests(one, record) and all(any(_is_part(name, a) for a in again) for name in one["tests"]):
            records.remove(one)
    records.append(record)
    records.sort(key=lambda one: [_numbers(one["torch"]), *_versions(one), one["tests"]])
    path.write_text(json.dumps(records, indent=1) + "\n")


def _versions(record: Record) -> tuple[str, ...]:
    return tuple(record[name] for name in VERSIONS)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.partition("+")[0].split(".")]


def _share_tests(record: Record, other: Record) -> bool:
    pairs = [(one, another) for one in record["tests"] for another in other["tests"]]
    return any(_is_part(one, another) or _is_part(another, one) for one, another in pairs)


def _is_part(one: str, whole: str) -> bool:
    """Whether a test, file or folder is one of those that the other names; "tests/test_*.py" are several."""
    path = PurePath(one.partition("::")[0])
    return one == whole or ("::" not in whole and any(part.match(whole) for part in (path, *path.parents)))


def rows(path: Path = RECORDS) -> str:
    """The table of all records; those of the same versions that share no test are one row."""
    together: list[list[Record]] = []
    for record in json.loads(path.read_text()):
        row = next((row for row in together if _fits(record, row)), None)
        if row is None:
            together.append([record])
        else:
            row.append(record)
    heads = [*VERSIONS[:3], "Horovod, MPI", "tests", "passed", "failed", "skipped", "date"]
    return table(heads, [_cells(row) for row in together])


def _fits(record: Record, row: list[Record]) -> bool:
    return _versions(record) == _versions(row[0]) and not any(_share_tests(record, one) for one in row)


def _cells(row: list[Record]) -> list[str]:
    """The row of a table, of records of the same versions."""
    skipped = Counter[str]()
    for record in row:
        skipped.update(record["skipped"])
    torch, python, numpy, horovod, mpi = _versions(row[0])
    tests = [one.replace("test_*.py", " (its own files)") for record in row for one in record["tests"]]
    failed = [f"`{name}`" for record in row for name in record["failed"]]
    reasons = "; ".join(f"{number}: {reason}" for reason, number in sorted(skipped.items()))
    cells = [torch, python, numpy, f"{horovod}, {mpi}" if horovod != "none" else "none"]
    cells += ["all" if tests == ["tests"] else ", ".join(tests), str(sum(one["passed"] for one in row))]
    cells += [", ".join(failed) or "0", reasons or "0", max(record["date"] for record in row)]
    return [cell.replace("|", "\\|") for cell in cells]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests, or write the table."""
    parser = argparse.ArgumentParser("python -m tests.versions", description=__doc__)
    parser.add_argument("torch", nargs="?", help="a version of torch; without it, the table is written")
    parser.add_argument("--numpy", help="a version of numpy; default: what the environment gets by itself")
    parser.add_argument("--without-horovod", action="store_true", help="nor mpi4py or an MPI")
    parser.add_argument("--record", action="store_true", help=f"keep what came of it, in {RECORDS.name}")
    given = list(sys.argv[1:] if arguments is None else arguments)
    ours, tests = given, list(WHOLE)
    if "--" in given:
        ours, tests = given[: given.index("--")], given[given.index("--") + 1 :] or tests
    options = parser.parse_args(ours)
    if options.torch is None:
        fill(PAGE, PLACE, rows())
        return 0
    if options.record and tuple(tests) != WHOLE and any(one.startswith("-") for one in tests):
        parser.error(f"--record takes files, folders and names of tests, and no options of pytest's: {tests}")
    folder = environment(options.torch, options.numpy, options.without_horovod)
    found = what_is_in(folder)
    if found["torch"].partition("+")[0] != options.torch.partition("+")[0]:
        parser.error(f"{sys.executable} has torch {found['torch']}, which is kept: take one without a torch")
    code, record = run(folder, tests)
    if options.record:
        keep(found | record)
    return code


if __name__ == "__main__":
    sys.exit(main())
