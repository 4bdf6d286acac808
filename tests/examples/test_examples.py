"""Each example runs as its first lines say, under mpirun, and trains."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpi.launch import MPIRUN, ROOT, run_job
from tests.torch_distributed.launch import torchrun

pytest.importorskip("horovod.torch", reason="needs Horovod")
pytest.importorskip("mlxtend", reason="needs the extra [examples]")


def run(script: str, ranks: int, *arguments: str) -> str:
    """What the example prints on so many ranks."""
    command = [MPIRUN, "-np", str(ranks)]
    command += [sys.executable, "-W", "ignore", "-m", "mpi4py", f"examples/{script}", *arguments]
    job = run_job(command)
    assert job.returncode == 0, job.stdout + job.stderr
    return job.stdout


def numbers(output: str, after: str) -> list[float]:
    """The number after each of these words."""
    return [float(number) for number in re.findall(rf"{after} ?([0-9.]+)", output)]


def test_digits() -> None:
    known = numbers(run("digits.py", 2, "--epochs", "2"), "accuracy")
    assert len(known) == 2
    assert known[-1] > 0.7, known  # by chance it would be 0.1


@pytest.mark.parametrize("local_steps", [1, 3])
def test_transformer(local_steps: int) -> None:
    output = run("transformer.py", 2, "--steps", "40", "--width", "32", "--local-steps", str(local_steps))
    losses = numbers(output, "loss")
    assert len(losses) == 4
    assert losses[-1] < losses[0] < 6, losses  # log 256 = 5.5 at the start


def test_nodes() -> None:
    output = run("nodes.py", 4, "--groups", "2", "--steps", "60")
    losses, inside = numbers(output, "loss"), numbers(output, "workers,")
    assert losses[-1] < losses[0] / 2, losses
    assert inside[-1] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_own_compressor(ranks: int) -> None:
    output = run("own_compressor.py", ranks, "--steps", "60")
    losses = numbers(output, "loss")
    assert losses[-1] < losses[0] / 2, losses
    if ranks > 1:
        assert 3.5 < numbers(output, "sent 1/")[-1] < 4


def test_preemptible(tmp_path: Path) -> None:
    def hash_after(checkpoint: Path) -> str:
        output = run("preemptible.py", 2, "--steps", "12", "--checkpoint", str(checkpoint))
        return output.rpartition("x has the hash ")[2].split()[0]

    whole = hash_after(tmp_path / "whole")
    assert len(whole) == 64
    assert hash_after(tmp_path / "again") == whole


def test_torchrun() -> None:
    job = torchrun(2, ["examples/torchrun.py", "--steps", "40"])
    assert job.returncode == 0, job.stderr
    losses = numbers(job.stdout, "loss")
    assert len(losses) == 4
    assert losses[-1] < losses[0] < 5.6, losses  # log 256 = 5.5 at the start


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_it_is_whole_and_has_a_test(script: str) -> None:
    text = (ROOT / "examples" / script).read_text()
    imported = {
        (node.module or "").split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom)
    }
    assert not imported & {"benchmarks", "tests", "examples"}
    assert re.search(rf"(python|torchrun .*) examples/{script}", text.split('"""')[1])
    assert f'{script}"' in Path(__file__).read_text()
    helped = subprocess.run(
        [sys.executable, f"examples/{script}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert helped.returncode == 0, helped.stderr
