"""The kernels load, or the twins stand in and say so once; numbers that are too large."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hvd_saef import kernels
from tests.kernels.versions import Direct, compiled
from tests.mpi.launch import LIMIT, ROOT

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BAD = [float("inf"), -float("inf"), float("nan")]


@pytest.fixture(params=[*(compiled.instruction_sets() if compiled else []), "twins"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way there is to compute here."""
    if request.param == "twins":
        with kernels.only("twins"):
            yield request.param
    else:
        assert compiled is not None
        before = compiled.set_instruction_set(request.param)
        yield request.param
        compiled.set_instruction_set(before)


def root(dtype: torch.dtype) -> float:
    """The largest number whose square is finite in float32, or in float64 for that; by bisection."""
    wide = torch.promote_types(dtype, torch.float32)
    fits, does_not = 1.0, torch.finfo(wide).max
    while (middle := float(torch.tensor((fits + does_not) / 2, dtype=wide))) not in (fits, does_not):
        square = torch.tensor(middle, dtype=wide).square()
        fits, does_not = (middle, does_not) if square.isfinite() else (fits, middle)
    return fits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 15, 33, 65535, 65537, 140000])
def test_one_number_too_many(way: str, dtype: torch.dtype, size: int) -> None:
    largest = torch.finfo(dtype).max
    for fits, most in ((kernels.all_finite, largest), (kernels.squares_fit, root(dtype))):
        most = min(most, largest)
        good = torch.full((size,), most, dtype=dtype)  # their sum overflows, and so does their norm
        if float(good[0]) > most:  # rounded to few bits
            good = torch.nextafter(good, torch.zeros_like(good))
        good[::2] *= -1
        above = torch.nextafter(good[:1].abs(), torch.full((1,), torch.inf, dtype=dtype)).item()
        assert fits([good, good, torch.zeros(0, dtype=dtype)])
        for place in {0, size // 2, size - 1}:
            for value in [*BAD, above, -above]:
                wrong = good.clone()
                wrong[place] = value
                assert not fits([good, wrong]), (value, place)
                assert not fits([wrong, good]), (value, place)


def test_any_strides_and_dtypes(way: str) -> None:
    big = torch.ones(8, 6, 4, 4)
    parts = [
        big.to(memory_format=torch.channels_last),
        big[:, 1:5],
        big[0].mT,
        torch.ones(()),
        torch.ones(1).expand(7),
        torch.empty(0),
    ]
    double = torch.ones(3, dtype=torch.complex64)  # a dtype that no kernel knows
    for fits in (kernels.all_finite, kernels.squares_fit):
        assert fits([])
        assert fits(parts)
        for i in range(len(parts) - 1):
            broken = [part.clone() for part in parts]
            contiguous = broken[i].is_contiguous()
            broken[i].view(-1)[-1:].fill_(torch.nan) if contiguous else broken[i].fill_(torch.nan)
            assert not fits(broken)
        assert fits([torch.nn.Parameter(big)])
        assert fits([double.real, torch.ones(2), torch.ones(2, dtype=torch.float64)])
    big[:, 0] = torch.inf  # outside what the part shows
    assert kernels.all_finite([parts[1]])


def test_what_no_kernel_takes() -> None:
    if compiled is None:
        pytest.skip("the kernels are not built")
    for tensors in ([torch.ones(2), torch.ones(2, dtype=torch.float64)], [torch.ones(2, dtype=torch.int32)]):
        with pytest.raises(ValueError, match=r"float32|one dtype"):
            compiled.at_most(tensors, 1.0)


def test_an_unknown_instruction_set() -> None:
    if compiled is None:
        pytest.skip("no kernels here")
    with pytest.raises(ValueError, match="no instruction set mmx"):
        compiled.set_instruction_set("mmx")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_the_environment_variable() -> None:
    code = (
        "import torch; from hvd_saef import kernels; "
        "assert kernels.version_for(torch.device('cpu'), torch.float32).describe() == 'plain torch'"
    )
    job = python("import warnings; warnings.simplefilter('error'); " + code, HVD_SAEF_KERNELS="twins")
    assert job.returncode == 0, job.stderr
    job = python(code, HVD_SAEF_KERNELS="native")
    assert job.returncode
    assert "HVD_SAEF_KERNELS='native'" in job.stderr


def test_missing_kernels_are_told_once_and_at_first_use() -> None:
    code = """
import sys, warnings
sys.modules["hvd_saef.kernels.compiled"] = None  # what is not built does not import
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import hvd_saef
    assert not caught
    for _ in range(3):
        sent = hvd_saef.Compression.sign.apply(torch.ones(3))
(warning,) = [w for w in caught if "kernels" in str(w.message)]
assert warning.category is RuntimeWarning
assert "make setup" in str(warning.message)
"""
    job = python(code, HVD_SAEF_KERNELS="")
    assert job.returncode == 0, job.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.all_finite([torch.ones(1)])  # none where they are


def test_without_a_compiler_the_build_goes_on(tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copytree(ROOT / "hvd_saef" / "kernels" / "csrc", tmp_path / "hvd_saef" / "kernels" / "csrc")
    shutil.copy(ROOT / "hvd_saef" / "kernels" / "sources.py", tmp_path / "hvd_saef" / "kernels")
    (tmp_path / "hvd_saef" / "kernels" / "__init__.py").touch()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    none = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    job = subprocess.run(
        command, cwd=tmp_path, env=os.environ | none, capture_output=True, text=True, timeout=LIMIT
    )
    assert job.returncode == 0, job.stderr
    assert "hvd_saef: the C++ kernels were not built" in job.stdout
    assert not list(tmp_path.rglob("*.so"))


def test_the_benchmark(tmp_path: Path) -> None:
    if compiled is None:
        pytest.skip("no kernels here")
    options = ["--layouts", "1e4", "tiny", "--threads", "1", "--turns", "2", "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), *options]
    job = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert job.returncode == 0, job.stderr
    lines = (tmp_path / "kernels.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 9
    assert (tmp_path / "kernels.png").stat().st_size
    job = subprocess.run([*command[:2], "--layouts", "none"], capture_output=True, text=True, timeout=LIMIT)
    assert job.returncode == 2
    assert "'none': a number of elements" in job.stderr


def test_an_address_is_kept_by_no_copy() -> None:
    """Pieces keep a table of where they are; what is copied is elsewhere."""
    if compiled is None:
        pytest.skip("no kernels here")
    runs, payload = torch.tensor([[0, 4, 1, 0]]), torch.empty(5, dtype=torch.uint8)
    first = kernels.Pieces([torch.zeros(4)])

    def show(x: torch.Tensor, pieces: kernels.Pieces) -> list[list[float]]:
        e = torch.zeros(4)
        Direct(compiled).sign_decode(x, runs, [], 1.0, e, payload.zero_(), None, 1.0, 0.0, pieces)
        return [piece.tolist() for piece in pieces]

    assert kernels.Pieces.of(first) is first
    assert show(torch.ones(4), first) == [[1.0] * 4]
    assert first.tables
    for copied in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert not copied.tables
        assert show(torch.full((4,), 2.0), copied) == [[2.0] * 4]
        assert first[0].tolist() == [1.0] * 4


def test_tensors_without_memory_are_refused() -> None:
    """A tensor that stands for another says that it is on the CPU, and has no address."""
    if compiled is None:
        pytest.skip("no kernels here")
    runs, payload = torch.tensor([[0, 4, 1, 0]]), torch.empty(5, dtype=torch.uint8)
    hollow = torch.zeros(4)
    hollow.untyped_storage().resize_(0)
    assert hollow.is_cpu
    with pytest.raises((ValueError, RuntimeError), match="delta: a tensor on the CPU"):
        Direct(compiled).sign_encode(hollow, runs, payload)
    with pytest.raises((ValueError, RuntimeError), match="on the CPU"):
        compiled.at_most([torch.ones(1), hollow], 1.0)


def test_the_threads_are_torchs() -> None:
    """As many as torch has, also after it has others."""
    if compiled is None:
        pytest.skip("no kernels here")
    code = """
import os, torch
from hvd_saef.kernels import compiled
big = [torch.ones(1 << 20)]
for threads in (1, 3, 2):
    torch.set_num_threads(threads)
    torch.ones(1 << 20).add_(1)
    before = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        assert compiled.at_most(big, 1.0)
    assert len(os.listdir("/proc/self/task")) == before, threads
"""
    job = python(code, OMP_NUM_THREADS="1")
    assert job.returncode == 0, job.stderr
