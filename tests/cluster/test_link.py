"""A link between two hosts that is cut while they train: those who are left say who is missing, and end."""

from __future__ import annotations

import re

import pytest

from benchmarks.hosts import why_not
from tests.mpi.faults import cut_link

pytest.importorskip("mpi4py", reason="needs mpi4py")
pytest.importorskip("horovod.torch", reason="needs Horovod")


@pytest.mark.skipif(why_not() is not None, reason=f"cannot make hosts: {why_not()}")
@pytest.mark.parametrize(("ranks", "missing"), [(2, "rank 1"), (4, "ranks 2, 3")])
def test_the_ranks_behind_a_cut_link_are_named(ranks: int, missing: str) -> None:
    """After HVD_SAEF_STALL_ABORT_S, 3 here, and not before."""
    said, seconds = cut_link(ranks)
    found = re.search(r"StalledExchangeError: (rank \d has waited ([0-9.]+) s in [^:]*: .*)", said)
    assert found is not None, said
    assert f"{missing} did not arrive: stopped, busy with something else, or cut off" in found[1]
    assert float(found[2]) >= 3
    assert seconds >= 2.5
