"""The Triton kernels compile for GPUs that are not here: nothing spills, nothing is fused.

`make test-triton` sets HVD_SAEF_LONG=1 and compiles all of them for all targets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.mpi.launch import LIMIT, ROOT

pytest.importorskip("triton", "3.6", reason="needs Triton 3.6 or newer")
NVIDIA = ["cuda:80:32", "cuda:90:32", "cuda:100:32"]
AMD = ["hip:gfx90a:64", "hip:gfx942:64"]
RUNS: list[list[str]] = (
    [[*NVIDIA, *AMD]]
    if os.environ.get("HVD_SAEF_LONG") == "1"
    else [
        [*NVIDIA, AMD[1], "--dtypes", "float32", "--kernels", "sign", "magnitudes"],
        [NVIDIA[1], "--dtypes", "float32", "--kernels", "topk"],
    ]
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What is known of each compiled kernel."""
    found = []
    for arguments in RUNS:
        cache = tmp_path_factory.mktemp("cache")
        job = subprocess.run(
            [sys.executable, "-m", "tests.kernels.compiling", *arguments],
            cwd=ROOT,
            env=os.environ | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path()},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert job.returncode == 0, job.stderr
        found += [json.loads(line) for line in job.stdout.splitlines()]
    return found


def path() -> str:
    """Where this process finds modules."""
    return os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry and Path(entry).is_dir())])


def test_nothing_spills_and_nothing_is_fused(compiled: list[dict[str, Any]]) -> None:
    assert {one["kernel"] for one in compiled} >= {"sign.encode", "sign.decode", "topk.encode", "topk.write"}
    assert {one["target"] for one in compiled} >= {*NVIDIA, AMD[1]}
    assert [one for one in compiled if one["spilled"]] == []
    assert [one for one in compiled if one["fused"]] == []


def words(one: dict[str, Any], kind: str) -> int:
    """How many numbers of the state's dtype a thread loads or stores for each element, in all branches."""
    bits = one["dtype"].removeprefix("float")
    elements: int = one["tile"] // (one["warps"] * 32)
    accesses: int = one["accesses"].get(f"{kind}.global {bits}", 0)
    return accesses // elements


def test_each_pass_touches_memory_once(compiled: list[dict[str, Any]]) -> None:
    """36 bytes a float32 parameter, both ways: e, x, y and Δ; then x, e, and x, e and b.

    The branch for blocks that travel whole, which other blocks do not take, loads the payload's values when
    it adds them, and when it encodes stores them and zeros.
    """
    looked = 0
    for one in compiled:
        if one["kernel"] == "sign.encode" and one["target"] in NVIDIA and one["dtype"] == "float32":
            assert (words(one, "ld") - 1, words(one, "st") - 2) == (3, 1), one
            looked += 1
        if one["kernel"] == "sign.decode" and one["target"] in NVIDIA and one["dtype"] == "float32":
            assert (words(one, "ld") - 1, words(one, "st")) == (2, 3), one
            looked += 1
        passes = ("topk.count_digits", "topk.count_kept")
        if one["kernel"] in passes and one["target"] in NVIDIA and one["dtype"] == "float32":
            assert (words(one, "ld"), words(one, "st")) == (1, 0), one
            looked += 1
    assert looked >= 2 * len(NVIDIA) + 2
