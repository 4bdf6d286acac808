"""A link between two hosts that is cut while they train: those who are left say who is missing, and end."""

from __future__ import annotations

import re

import pytest

from benchmarks.hosts import why_not
from tests.mpi.faults import cut_link

NAMES = [(2, "rank 1"), (4, "ranks 2, 3")]


@pytest.mark.skipif(why_not() is not None, reason=f"cannot make hosts: {why_not()}")
@pytest.mark.parametrize(
    ("carrier", "ranks", "missing"),
    [*(("mpi", *names) for names in NAMES), ("torch", *NAMES[1])],
)
def test_the_ranks_behind_a_cut_link_are_named(carrier: str, ranks: int, missing: str) -> None:
    """After HVD_SAEF_STALL_ABORT_S, 3 here, and not before."""
    if carrier == "mpi":
        pytest.importorskip("mpi4py", reason="needs mpi4py")
        pytest.importorskip("horovod.torch", reason="needs Horovod")
    said, seconds = cut_link(ranks, carrier)
    found = re.search(r"StalledExchangeError: (rank \d has waited ([0-9.]+) s in [^:]*: .*)", said["h0"])
    assert found is not None, said
    assert f"{missing} did not arrive: stopped, busy with something else, or cut off" in found[1]
    assert float(found[2]) >= 3
    assert seconds >= 2.5
    if carrier == "torch":  # the ranks on the other side have no launcher that knows, and end by themselves
        words = r"StalledExchangeError: rank [23] has waited .*: ranks 0, 1 did not arrive"
        assert re.search(words, said["h1"]), said
