"""Runs Horovod's own tests of DistributedOptimizer with ours in its place.

python -m tests.mpi.horovod_suite [--source PATH_OR_URL_OF_HOROVODS_REPOSITORY] [--np 2] [NAME ...]
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.mpi.launch import ENVIRONMENT, LIMIT, MPIRUN, ROOT

TAG = "v0.28.1"
FILE = Path("test", "parallel", "test_torch.py")
OURS = [
    ("import horovod.torch as hvd\n", "import hvd_saef\nimport horovod.torch as hvd\n"),
    ("hvd.DistributedOptimizer(", "hvd_saef.DistributedOptimizer("),
]
APART = "its ranks start from different parameters and never broadcast them: a ConsensusError here"
CANNOT_PASS = {
    "test_broadcast_state": APART,
    "test_broadcast_state_options": APART,
    "test_dynamic_requires_grad": APART,
    "test_no_named_parameters": APART,
    "test_sparse_embeddings": APART,
    "test_force_allreduce": "constructs an optimizer of newer torches in a way it does not take",
    "test_synchronize_step_warning": "warns of gradients averaged twice; compressed training averages none",
    "test_optimizer_no_named_parameters": "reads a private attribute of Horovod's class",
}


def clone(source: str, folder: Path) -> None:
    """Horovod's repository at the tag."""
    command = ["git", "-c", "advice.detachedHead=false", "clone", "-q", "--depth", "1", "-b", TAG]
    subprocess.run(
        [*command, source, str(folder)], check=True, env=ENVIRONMENT | {"GIT_LFS_SKIP_SMUDGE": "1"}
    )


def put_ours(file: Path, changes: Sequence[tuple[str, str]]) -> None:
    """Change what a script of Horovod's says, each change at least once."""
    text = file.read_text()
    for theirs, ours in changes:
        if theirs not in text:
            raise SystemExit(f"{file} does not hold {theirs!r}: it is not Horovod's at {TAG}.")
        text = text.replace(theirs, ours)
    file.write_text(text)


def fetch(source: str, folder: Path) -> Path:
    """Clone Horovod, put our optimizer into its tests, and return their file."""
    clone(source, folder)
    file = folder / FILE
    put_ours(file, OURS)
    (file.parent / "mock.py").write_text("from unittest.mock import *\n")  # Python has it
    return file


def tests_of(file: Path) -> list[str]:
    """The tests that make an optimizer of ours, as class::name."""
    source = file.read_text()
    return [
        f"{kind.name}::{function.name}"
        for kind in ast.parse(source).body
        if isinstance(kind, ast.ClassDef)
        for function in kind.body
        if isinstance(function, ast.FunctionDef)
        and OURS[1][1] in (ast.get_source_segment(source, function) or "")
    ]


def run(file: Path, test: str, ranks: int) -> tuple[str, str]:
    """How one test ended on `ranks` ranks, in a job of its own, and the lines that say why."""
    pytest = ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--color=no", f"{file}::{test}"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    try:
        job = subprocess.run(
            [MPIRUN, "-np", str(ranks), sys.executable, *pytest],
            cwd=file.parent,  # not where Horovod's unbuilt package lies
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return "hangs", ""
    said = job.stdout.splitlines()
    if job.returncode:
        return "fails", next((line[4:] for line in said if line.startswith("E   ")), job.stderr[-300:])
    skipped = next((line for line in said if line.startswith("SKIPPED")), "")
    return ("skipped" if skipped else "passes"), skipped


def main() -> int:
    """Run what was asked for; 1 if anything ended otherwise than known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="https://github.com/horovod/horovod", help="a clone, or its URL")
    parser.add_argument("--np", type=int, default=2, help="ranks")
    parser.add_argument("names", nargs="*", help="tests; all of DistributedOptimizer if none is given")
    args = parser.parse_args()
    surprises = 0
    with tempfile.TemporaryDirectory() as folder:
        file = fetch(args.source, Path(folder) / "horovod")
        for test in tests_of(file):
            name = test.split("::")[1]
            if args.names and name not in args.names:
                continue
            end, why = run(file, test, args.np)
            known = CANNOT_PASS.get(name)
            surprise = (end in ("fails", "hangs")) != (known is not None)
            surprises += surprise
            print("!" if surprise else " ", name, end, *([f"({known})"] if known else []), why, flush=True)
    return surprises > 0


if __name__ == "__main__":
    sys.exit(main())
