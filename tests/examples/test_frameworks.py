"""Each example of examples/frameworks trains, resumes, evaluates at x, and ends where the plain loop does."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from tests.mpi.launch import ROOT
from tests.torch_distributed.launch import torchrun

NEEDS = {
    "plain": (),
    "accelerate": ("accelerate",),
    "trainer": ("accelerate", "transformers"),
    "lightning": ("lightning",),
    "timm": ("timm",),
}
"""The packages that each example needs."""
SAME_BITS = ("accelerate", "trainer")
"""The examples whose x has the bits of the plain loop's. Lightning adds up the norms that it clips in another
order, and timm computes the learning rate by another formula."""


def lack(name: str) -> str:
    """What is missing for an example; "" if nothing is."""
    packages = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if packages:
        return f"needs {' and '.join(packages)}: the extra [frameworks]"
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6)
    return "transformers needs torch 2.6" if old and "transformers" in NEEDS[name] else ""


@cache
def reports() -> dict[str, dict[str, Any]]:
    """What tests/examples/frameworks.py wrote: one job for all."""
    names = [name for name in NEEDS if not lack(name)]
    with TemporaryDirectory() as folder:
        job = torchrun(2, ["tests/examples/frameworks.py", folder, *names], PYTHONPATH=str(ROOT))
        assert job.returncode == 0, job.stdout + job.stderr
        found: dict[str, dict[str, Any]] = json.loads(Path(folder, "reports.json").read_text())
    return found


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """The name of an example, whose packages are here."""
    name = str(request.param)
    if lack(name):
        pytest.skip(lack(name))
    return name


def each(*names: str) -> pytest.MarkDecorator:
    """Runs a test for each of these examples."""
    return pytest.mark.parametrize("name", names, indirect=True)


@each(*NEEDS)
def test_it_trains_and_all_ranks_have_the_same_x(name: str) -> None:
    first, second = reports()[name]["whole"]
    assert first == second
    losses = first["losses"]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 5.5  # log 256 at the start


@each(*NEEDS)
def test_it_resumes_to_the_bit(name: str) -> None:
    report = reports()[name]
    for whole, resumed in zip(report["whole"], report["resumed"], strict=True):
        assert resumed["x"] == whole["x"]
        assert resumed["average"] == whole["average"]
        assert resumed["losses"][-1] == whole["losses"][-1]


@each("accelerate", "trainer", "lightning", "timm")
def test_its_loss_is_the_plain_loops(name: str) -> None:
    report = reports()[name]
    assert report["whole"][0]["losses"] == pytest.approx(report["plain"][0]["losses"], rel=1e-5)
    if name in SAME_BITS:
        assert report["whole"][0]["x"] == report["plain"][0]["x"]


@each("accelerate", "trainer", "lightning")
def test_what_the_framework_saves_is_x_and_so_is_what_it_evaluates(name: str) -> None:
    report = reports()[name]
    loss, x = report["saved"]
    assert x == report["whole"][0]["x"]
    assert loss == pytest.approx(report["whole"][0]["losses"][-1], rel=1e-6)


@each(*NEEDS)
def test_nothing_is_lost_on_the_way(name: str) -> None:
    """hvd_saef warns where errors are cleared, and where parameters were changed by others."""
    ours = [text for text in reports()[name]["warnings"] if re.search("errors|parameter '", text)]
    assert ours == []


@each("accelerate", "trainer", "lightning")
def test_distributed_data_parallel_is_refused(name: str) -> None:
    """Without the lines that keep it away."""
    assert "DistributedDataParallel averages the gradients" in reports()[name]["unkept"]


@each("timm")
def test_timms_optimizers(name: str) -> None:
    found = reports()[name]["optimizers"]
    assert len(found) > 20
    assert [kind for kind, (same_x, _) in found.items() if not same_x] == []
    # It draws from a generator that it does not save: without hvd_saef it does not resume to the bit either.
    assert [kind for kind, (_, resumes) in found.items() if not resumes] == ["adahessian"]


def test_each_script_is_run_here_as_it_says() -> None:
    scripts = {path.stem: path.read_text() for path in (ROOT / "examples/frameworks").glob("*.py")}
    assert set(scripts) == {"gpt" if name == "plain" else f"gpt_{name}" for name in NEEDS}
    for script, text in scripts.items():
        assert f"torchrun --nproc-per-node 2 examples/frameworks/{script}.py" in text.split('"""')[1]
        assert "# Differs: " in text
