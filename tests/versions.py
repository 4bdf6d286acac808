"""Runs the tests with a torch of your choice, and writes the table of what was tried.

    python -m tests.versions 2.3.1 --numpy 1.26.4 --record -- tests/kernels
    python -m tests.versions

The first makes an environment of its own for this Python, outside the checkout, or takes the one that it
made before, and runs pytest there. `make test-torch` is the same. The second writes the table into
docs/versions.md, from the records beside it. Needs Python alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path
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
KEYS = ("torch", "Python", "numpy", "Horovod", "MPI", "tests")
"""What a record is of: a newer record of the same takes its place."""
ASK = """
import importlib.metadata, json, platform, shutil, subprocess, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
mpirun = shutil.which("mpirun")
said = subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout if mpirun else "none"
print(json.dumps({"torch": version("torch"), "Python": platform.python_version(), "numpy": version("numpy"),
    "Horovod": version("horovod"), "MPI": said.splitlines()[0].removeprefix("mpirun ")}))
"""
Record = dict[str, Any]


def environment(torch: str, numpy: str | None, without_horovod: bool) -> Path:
    """The folder of the environment, which bootstrap.sh has made or found ready."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvd_saef"
    parts = [f"torch{torch}", f"py{platform.python_version()}"]
    parts += [f"numpy{numpy}"] * bool(numpy) + ["no-horovod"] * without_horovod
    folder = cache / "environments" / "-".join(parts)
    if numpy:  # before torch, which takes what is there
        if not folder.exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-q", f"numpy=={numpy}"], check=True)
    command = [str(ROOT / "launch" / "bootstrap.sh"), "--venv", str(folder)]
    command += ["--without-horovod"] * without_horovod
    subprocess.run(command, env=os.environ | {"TORCH": torch, "PYTHON": sys.executable}, check=True)
    return folder


def run(folder: Path, tests: Sequence[str]) -> tuple[int, Record]:
    """The exit code of pytest, and the record of what it ran."""
    python = str(folder / "bin" / "python")
    variables = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),  # the environment may know another checkout
        "OMP_NUM_THREADS": "1",
    }
    ask = [python, "-c", ASK]
    record: Record = json.loads(subprocess.run(ask, env=variables, stdout=subprocess.PIPE, check=True).stdout)
    record["date"] = date.today().isoformat()
    record["tests"] = " ".join(tests) if tuple(tests) != WHOLE else "all"
    with TemporaryDirectory() as where:
        report = Path(where) / "report.xml"
        pytest = ["-m", "pytest", "-q", "-n", "auto", "--dist", "loadgroup", f"--junitxml={report}", *tests]
        code = subprocess.run([python, *pytest], cwd=ROOT, env=variables, check=False).returncode
        return code, record | counts(report)


def counts(report: Path) -> Record:
    """How many tests passed and failed, and how many were skipped for which reason, by pytest's report."""
    passed, failed, skipped = 0, [], Counter[str]()
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag: child for child in case}
        if "skipped" in kinds:
            skipped[kinds["skipped"].get("message", "")] += 1
        elif {"failure", "error"} & set(kinds):
            failed.append(f"{case.get('classname')}.{case.get('name')}")
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": dict(sorted(skipped.items()))}


def keep(record: Record, path: Path = RECORDS) -> None:
    """Put the record in the place of the older one of the same, or add it; they are in order of versions."""
    records: list[Record] = json.loads(path.read_text()) if path.exists() else []
    others = [one for one in records if any(one[key] != record[key] for key in KEYS)]
    ordered = sorted([*others, record], key=lambda one: [_numbers(one["torch"]), *map(str, one.values())])
    path.write_text(json.dumps(ordered, indent=1) + "\n")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.partition("+")[0].split(".")]


def rows(path: Path = RECORDS) -> str:
    """The table of all records."""
    heads = ["torch", "Python", "numpy", "Horovod, MPI", "tests", "passed", "failed", "skipped", "date"]
    lines = []
    for one in json.loads(path.read_text()):
        skipped = "; ".join(f"{number}: {reason}" for reason, number in one["skipped"].items())
        mpi = f"{one['Horovod']}, {one['MPI']}" if one["Horovod"] != "none" else "none"
        failed = ", ".join(f"`{name}`" for name in one["failed"]) or "0"
        cells = (one["torch"], one["Python"], one["numpy"], mpi, one["tests"], str(one["passed"]), failed)
        lines.append([*cells, skipped.replace("|", "\\|") or "0", one["date"]])
    return table(heads, lines)


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
    folder = environment(options.torch, options.numpy, options.without_horovod)
    code, record = run(folder, tests)
    if options.record:
        keep(record)
    return code


if __name__ == "__main__":
    sys.exit(main())
