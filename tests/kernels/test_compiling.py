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
SIGN = ["sign.encode", "sign.reduce", "sign.settle", "sign.decode", "magnitudes.look"]
TOPK = [f"topk.{name}" for name in ("encode", "count_digits", "count_kept", "place_kept", "write")]
ADDED = ["topk_added.index_pages", "topk_added.add 2"]
ODD = ["--kinds", "odd", "small", "tiny", "small, wide"]
RUNS: list[list[str]] = (
    [[*NVIDIA, *AMD], [NVIDIA[1], *ODD]]
    if os.environ.get("HVD_SAEF_LONG") == "1"
    else [
        [*NVIDIA, AMD[1], "--dtypes", "float32", "--kernels", *SIGN],
        [NVIDIA[1], "--dtypes", "float32", "--kernels", *TOPK, *ADDED],
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


Count = tuple[int, int]
"""How many numbers of the state's dtype a thread loads and stores for an element."""
TOUCHED: dict[str, tuple[Count, Count]] = {
    "sign.encode": ((3, 1), (0, 2)),  # e, x, y; Δ. Of whole blocks: what is sent, and 0
    "sign.encode 2": ((1, 1), (1, 2)),  # the server's; of whole blocks also values that are added
    "sign.settle": ((1, 1), (0, 0)),
    "sign.decode": ((2, 3), (1, 0)),  # x, e; x, e, b. Of whole blocks: the values
    "topk.encode": ((3, 1), (0, 5)),  # as sign's. Whole and small blocks: what is left, and what is sent
    "topk.encode 2": ((1, 0), (0, 4)),
    "topk.count_digits": ((1, 0), (0, 0)),
    "topk.count_kept": ((1, 0), (0, 0)),
    "topk.write": ((1, 0), (0, 2)),  # Δ. Of what is kept: the value, and the rest
    "topk_added.add": ((0, 0), (4, 2)),  # of what is kept, and of whole blocks: the value, and the memory
    "topk_added.add 2": ((2, 1), (4, 2)),  # x, e; b
    "magnitudes.look": ((1, 0), (0, 0)),
}
"""What each kernel does with every element of a large block; and, in other branches, with some elements."""


def touched(one: dict[str, Any]) -> Count:
    """What the compiled code loads and stores for an element, in all branches."""
    bits = one["dtype"].removeprefix("float")
    elements: int = one["tile"] // (one["warps"] * 32)
    loads, stores = (one["accesses"].get(f"{kind}.global {bits}", 0) // elements for kind in ("ld", "st"))
    return loads, stores


def test_each_pass_touches_memory_once(compiled: list[dict[str, Any]]) -> None:
    looked = set()
    for one in compiled:
        name = one["kernel"] if one["kernel"] in TOUCHED else one["kernel"].split(" ")[0]
        if one["target"] in NVIDIA and one["kind"] == "usual" and name in TOUCHED:
            (loads, stores), (more_loads, more_stores) = TOUCHED[name]
            assert touched(one) == (loads + more_loads, stores + more_stores), one
            looked.add((name, one["target"]))
    assert {name for name, _ in looked} >= {"sign.encode", "sign.settle", "sign.decode", "topk.encode"}
    assert {target for _, target in looked} == set(NVIDIA)
    assert len(looked) >= 4 * len(NVIDIA) + 5


def test_these_are_the_bytes_that_are_promised() -> None:
    """36 bytes a float32 parameter for sign both ways; 36 to send and 12 to receive for Top-K."""

    def numbers(*kernels: str) -> int:
        return sum(sum(TOUCHED[kernel][0]) for kernel in kernels)

    assert 4 * numbers("sign.encode", "sign.decode") == 36
    assert 4 * numbers("topk.encode", *(3 * ["topk.count_digits"]), "topk.count_kept", "topk.write") == 36
    assert 4 * numbers("topk_added.add 2") == 12
