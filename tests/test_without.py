"""What is taken away in tests.without is there, and its tests are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mpi.launch import ROOT
from tests.without import PROTECTIONS, patches


@pytest.mark.parametrize("name", PROTECTIONS)
def test_what_is_replaced_is_there(name: str) -> None:
    for patch in patches(name):
        with patch:
            pass
    for test in PROTECTIONS[name].tests:
        file, _, function = test.partition("::")
        function = function.partition("[")[0]
        check = test.partition("test_check[")[2].partition("-")[0]
        names = [f"def {function}("] + ([f"def {check}("] if check.startswith(("every", "a_")) else [])
        sources = (ROOT / file).read_text() + Path(ROOT, "tests/transport/checks.py").read_text()
        assert all(name in sources for name in names)
