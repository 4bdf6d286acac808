"""The checks of `make test-gpu` on the CPU, where they are tiny and Triton's kernels are interpreted.

On a GPU they are skipped here, since this process has chosen the interpreter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.pieces import Command, Place
from tests.gpu import __main__, broken
from tests.gpu.__main__ import LIMITS
from tests.gpu.registry import CHECKS, Lacking
from tests.workers import NO_MODEL

pytestmark = [
    pytest.mark.filterwarnings(NO_MODEL),
    pytest.mark.filterwarnings("ignore:the largest block"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]
LEFT_OUT = ("4 ranks over gloo",)
"""What costs too much where cores are few; it differs from others by its numbers alone."""
ROUNDS = (
    "sign: parameters of 16 bits",
    "Top-K 20 % in bfloat16: float32",
    "Top-K 1 % in float16, small blocks dense: parameters of 16 bits",
)
"""Of the checks of a round, whose names have a colon, these are enough here: test_triton.py has more."""
EVERY = [
    (piece, name)
    for piece in CHECKS
    for name in CHECKS[piece]
    if name not in LEFT_OUT and (": " not in name or name in ROUNDS)
]
HERE = Place(torch.device("cpu"), tiny=True)
ON_A_GPU = (
    "make test-gpu" if torch.cuda.is_available() else "no GPU: make test-gpu runs it where there is one"
)


def test_every_piece_has_a_limit_and_checks() -> None:
    assert set(LIMITS) == set(CHECKS)
    assert len(EVERY) > 20
    assert sum(map(len, CHECKS.values())) > 30
    assert all(any(name in CHECKS[piece] for piece in CHECKS) for name in (*LEFT_OUT, *ROUNDS))


@pytest.mark.parametrize(("piece", "name"), EVERY, ids=lambda word: word.replace(" ", "_"))
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skip(reason=ON_A_GPU))])
def test_check(device: str, piece: str, name: str) -> None:
    try:
        CHECKS[piece][name](HERE)
    except Lacking as lacking:
        pytest.skip(f"this machine lacks: {lacking}")


Answer = tuple[int, dict[str, Any], str]


def run(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Answer:
    """The exit code of a command, its JSON, and its table."""
    monkeypatch.setattr(sys, "argv", [command.module, "--out", str(folder), *arguments])
    code = command.main()
    path = folder / f"{command.name}.json"
    return code, json.loads(path.read_text()), path.with_suffix(".txt").read_text()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes a JSON and a table, whose rows are those of the pieces; another run resumes."""
    here = ("--device", "cpu", "--only", "sanitizer")
    code, found, table = run(__main__.COMMAND, tmp_path, monkeypatch, *here)
    assert code == 0, table
    assert found["pieces"]["sanitizer"]["outcome"] == "done"
    assert [row["outcome"] for row in found["rows"]] == 3 * ["skipped"]
    assert "sanitizer: memcheck\n    this machine lacks: a GPU" in table
    assert "0 passed, 0 failed, 3 skipped" in table
    if not torch.cuda.is_available():
        more = ("--only", "sanitizer", "amp", "--resume")
        code, found, table = run(__main__.COMMAND, tmp_path, monkeypatch, *more)
        assert code == 2
        assert len(found["rows"]) == 3
        assert found["pieces"]["amp"]["outcome"] == "skipped"
        assert "amp: skipped, 0 s no GPU" in table


def test_what_fails_or_hangs_keeps_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it said; the other pieces run all the same."""
    endless = ("--device", "cpu", "--seconds", "1e6")
    code, found, _ = run(broken.COMMAND, tmp_path, monkeypatch, *endless)
    assert code == 1
    assert found["rows"][0]["check"] == "one"
    assert found["pieces"]["fails"]["outcome"] == "failed"
    assert "OSError: the disk is gone" in found["pieces"]["fails"]["detail"]
    assert found["pieces"]["hangs"]["outcome"] == "out of time"


def test_no_piece_is_begun_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found, table = run(broken.COMMAND, tmp_path, monkeypatch, "--device", "cpu", "--seconds", "1")
    assert code == 1
    assert {end["outcome"] for end in found["pieces"].values()} == {"not run"}
    assert "no time was left of --seconds 1" in table
