"""Times the whole step between hosts with slow links, which are namespaces of one machine.

    python benchmarks/cluster.py                                  # as root; resumes where it was stopped
    python benchmarks/cluster.py --rates 1gbit --hosts 2 --rounds 2

Runs benchmarks/step.py, a rank a host (benchmarks/hosts.py), for each rate and number of hosts. Each such
piece has a CSV of its own in the output folder, and where that is there already, the piece is not run again
(--again runs it). "unlimited" is links without a limit, "memory" no hosts at all but ranks that share
memory. Bytes are those of the interfaces' counters, with Horovod's idle traffic subtracted, beside those
that stats() claims and the theory. All ranks share this machine's cores: with more hosts than cores
computing takes longer too, so compare within a piece.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from benchmarks.hosts import ENVIRONMENT, INTERFACE, MPIRUN, Hosts, bits_per_second, stopping_cleanly, why_not
from benchmarks.models import SHAPES
from benchmarks.timings import Timing, plot, read, summarize, table, write

RATES = ["100mbit", "1gbit", "10gbit", "unlimited", "memory"]
STEP = ROOT / "benchmarks" / "step.py"


def run_piece(args: argparse.Namespace, rate: str, number: int, out: Path) -> bool:
    """Run step.py at one rate on one number of hosts; whether it went well. What it says goes to a log."""
    command = [sys.executable, str(STEP), "--model", args.model, "--rounds", str(args.rounds)]
    command += ["--steps", str(args.steps), "--seconds", str(args.seconds), "--rate", rate, "--out", str(out)]
    command += ["--methods", *args.methods] if args.methods else []
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".log"), "w") as log:
        try:
            if rate == "memory":
                start = [MPIRUN, "-np", str(number)]
                done = subprocess.run(
                    [*start, *command],
                    env={**os.environ, **ENVIRONMENT},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    timeout=args.timeout,
                )
                return done.returncode == 0
            with Hosts(number, rate) as hosts:
                start = hosts.mpirun([*command, "--interface", INTERFACE])
                return hosts.run(start, args.timeout, output=log) == 0
        except subprocess.TimeoutExpired as expired:
            log.write(f"\n{expired}\n")
            return False


def bytes_table(pieces: Sequence[Sequence[Timing]]) -> str:
    """What the interfaces counted over the theory, by piece and method; and whether stats() says the same."""
    lines = [
        "Bytes that the interfaces counted, over the theory; after the comma what stats() claims, over it"
    ]
    methods = list(dict.fromkeys(timing.method for timings in pieces for timing in timings))
    counted = [t for t in pieces if t[0].rate != "memory"]
    heads = [f"{timings[0].rate} x{timings[0].workers}" for timings in counted]
    lines.append(f"{'method':<22}" + "".join(f"{head:>18}" for head in heads))
    for method in methods:
        cells = []
        for timings in counted:
            row = next((row for row in summarize(timings) if row.method == method), None)
            cells.append(_shares(row.interface, row.claimed, row.theory) if row and row.theory else "-")
        lines.append(f"{method:<22}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def _shares(interface: float, claimed: float, theory: float) -> str:
    return f"{interface / theory:.4f}" + ("" if math.isnan(claimed) else f", {claimed / theory:.5f}")


def report(pieces: list[list[Timing]], folder: Path, parameters: int) -> None:
    """All pieces of a model in one CSV, one text and one plot."""
    pieces = sorted(
        pieces, key=lambda p: (RATES.index(p[0].rate) if p[0].rate in RATES else 99, p[0].workers)
    )
    path = folder / f"cluster-{pieces[0][0].model}.csv"
    write([timing for timings in pieces for timing in timings], path)
    text = "\n\n".join([*(table(timings, parameters) for timings in pieces), bytes_table(pieces)])
    path.with_suffix(".txt").write_text(text + "\n")
    plot(pieces, path.with_suffix(".png"))
    print(text, f"\n\nWritten: {path}, and .txt and .png beside it")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rates", nargs="+", default=RATES, help="of the links: 100mbit, 1gbit, unlimited, memory"
    )
    parser.add_argument("--hosts", nargs="+", type=int, default=[2, 4, 8], help="how many, a rank each")
    parser.add_argument("--model", choices=SHAPES, default="resnet50", help="25.6, 100 or 0.1 M parameters")
    parser.add_argument("--methods", nargs="+", help="what to compare, by step.py's names; all if not given")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each method, in each piece")
    parser.add_argument("--steps", type=int, default=8, help="of a turn, at most (but whole periods)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn, about: fewer steps if slow")
    parser.add_argument("--timeout", type=float, default=4 * 3600, help="seconds that a piece may take")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "cluster", help="folder for results")
    parser.add_argument("--again", action="store_true", help="run pieces again whose results are there")
    args = parser.parse_args()
    for rate in args.rates:
        if rate != "memory":
            try:
                bits_per_second(rate)
            except ValueError as error:
                parser.error(str(error))
    return args


def main() -> int:
    """Run what is missing, then report on what there is."""
    args = arguments()
    wanted = [(rate, number) for number in args.hosts for rate in args.rates]
    files = {piece: args.out / f"{args.model}-{piece[0]}-{piece[1]}.csv" for piece in wanted}
    missing = [piece for piece in wanted if args.again or not files[piece].exists()]
    reason = why_not() if any(rate != "memory" for rate, _ in missing) else None
    if reason:
        print(f"cluster.py: {reason}", file=sys.stderr)
        return 1
    failed = 0
    with contextlib.suppress(KeyboardInterrupt), stopping_cleanly():
        for rate, number in (bar := tqdm(missing, unit="piece", ncols=100)):
            bar.set_description(f"{rate}, {number} hosts")
            if not run_piece(args, rate, number, files[rate, number]):
                failed += 1
                log = files[rate, number].with_suffix(".log")
                bar.write(f"{rate}, {number} hosts: failed, see {log}")
        missing = []
    pieces = [read(path) for path in args.out.glob(f"{args.model}-*-*.csv")]
    if pieces:
        report(pieces, args.out, sum(map(math.prod, SHAPES[args.model]())))
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
