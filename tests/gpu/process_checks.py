"""Workers that are processes with one device, over torch.distributed; and the kernels under a sanitizer."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.gpu.machine import sanitizer
from benchmarks.gpu.pieces import ROOT, Place
from tests.gpu.registry import Lacking, check
from tests.torch_distributed.launch import run_ranks

FOUND = 77
"""The exit code by which a sanitizer says that it has found something."""


def ranks_of(size: int, place: Place) -> None:
    """A job of so many ranks, each of which runs tests/gpu/ranks.py."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "wrong")
        steps = "2" if place.tiny else "6"
        ended = run_ranks(size, ["-m", "tests.gpu.ranks", str(output), str(place.device), steps])
        for rank, one in enumerate(ended):
            assert one.code == 0, f"rank {rank}: {one.said[-3000:]}"
            assert json.loads(Path(f"{output}.{rank}").read_text()) == {}


for _size in (2, 4):
    check("processes", f"{_size} ranks over gloo")(partial(ranks_of, _size))


def sanitized(tool: str, place: Place) -> None:
    """The kernels' checks at small sizes, under compute-sanitizer."""
    if not place.on_gpu:
        raise Lacking("a GPU")
    program = sanitizer()
    if program is None:
        raise Lacking("compute-sanitizer")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows")
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-m", "tests.gpu"]
        command += ["--piece", "kernels", "--tiny", "--rows", str(rows), "--device", str(place.device)]
        job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert job.returncode == 0, (job.stdout + job.stderr)[-3000:]
        outcomes = [json.loads(line) for line in rows.read_text().splitlines()]
        assert outcomes
        assert [row for row in outcomes if row["outcome"] == "failed"] == []


for _tool in ("memcheck", "racecheck", "initcheck"):
    check("sanitizer", _tool)(partial(sanitized, _tool))
