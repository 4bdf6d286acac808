"""Predicts steps with 8 ranks a node by the MODEL of `hvd-saef plan`, as a table in Markdown. Without MPI.

    python -m benchmarks.nodes_model            # prints the table
    python -m benchmarks.nodes_model --write    # and puts it into docs/nodes.md

Nothing of it is measured. To be run again whenever the package's constants are fitted anew.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.pages import fill, table
from hvd_saef.planning.constants import FEATURES, Constants
from hvd_saef.planning.plan import Job, Method, methods, predict

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "nodes.md"
WIRE_ALONE = Constants({name: float(name == "wire") for name in FEATURES})
"""The wire is full all the time, and nothing else takes any time."""
PARAMETERS, TENSORS = 25_600_000, 160
RANKS, A_NODE, INSIDE, COMPUTE = 64, 8, 200e9, 0.12
BANDWIDTHS = (1e9, 1e10, 1e11)
SHOWN = ("Horovod float32", "Horovod fp16", "sign DC, p = 16", "sign DC", "Top-K 1 %")


def job(bandwidth: float) -> Job:
    """64 ranks on 8 nodes, whose links between nodes have this bandwidth."""
    return Job(TENSORS * (PARAMETERS // TENSORS,), RANKS, bandwidth, COMPUTE, A_NODE, INSIDE)


def prediction() -> str:
    """Seconds of a step with the wire alone, and in brackets with the package's constants."""
    fitted = Constants.load()
    heads = ["", "MB that a node sends", *(f"{bandwidth / 1e9:g} Gbit/s" for bandwidth in BANDWIDTHS)]
    jobs = [job(bandwidth) for bandwidth in BANDWIDTHS]

    def cell(method: Method, where: Job) -> str:
        return f"{predict(method, where, WIRE_ALONE):.3f} ({predict(method, where, fitted):.3f})"

    def row(method: Method) -> list[str]:
        sent = f"{method.bytes_between_nodes(jobs[0]) / 1e6:.1f}"
        return [method.name, sent, *(cell(method, where) for where in jobs)]

    shown = [method for method in methods(jobs[0]) if method.name.removesuffix(", node") in SHOWN]
    return "\n".join(
        [
            f"MODEL, not a measurement: seconds of a step of {PARAMETERS / 1e6:g} M parameters with {RANKS}",
            f"ranks, {A_NODE} a node, {COMPUTE:g} s of compute, {INSIDE / 1e9:g} Gbit/s a rank inside nodes,",
            "by what links between nodes send: the wire alone; in brackets with the constants that come with",
            f"the package, fitted on {fitted.source}.",
            "",
            table(heads, map(row, shown)),
        ]
    )


def main() -> int:
    """Print the table, and write it where the page has it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put it into docs/nodes.md")
    args = parser.parse_args()
    text = prediction()
    print(text)
    if args.write:
        fill(PAGE, "benchmarks.nodes_model", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
