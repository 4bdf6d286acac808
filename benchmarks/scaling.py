"""A MODEL of a step's time, fitted on cluster.py's runs, and what it predicts for 2 to 4,096 workers.

    python benchmarks/scaling.py                    # reads runs/cluster/, writes runs/scaling/
    python benchmarks/scaling.py --save             # and makes the fit what `hvd-saef plan` answers from

The latency-bandwidth-compute model is `hvd_saef.planning.plan`. It is fitted by least squares of the relative
error on some pieces (a rate and a number of hosts each), then held against those that it has not seen. What
it says of more workers than were measured is a prediction; every table and plot says so.

Steps on two to four hosts do not tell what a message costs, so that is no part of the fit: it is estimated,
or taken from a file of `hvd-saef calibrate` (--known). What overlap hides was measured apart (--overlap).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.hosts import bits_per_second
from benchmarks.models import SHAPES
from benchmarks.pictures import save
from benchmarks.timings import LOCAL, Timing, read, summarize
from hvd_saef.planning import plan
from hvd_saef.planning.constants import ETHERNET, FEATURES, GENERAL, Constants
from hvd_saef.planning.plan import METHODS, Job, Method, predict, stops_paying

LABEL = "MODEL, not a measurement"
PLANNED = {method.name: method for method in METHODS}
PROCESSOR = ["byte", "land", *(name for name in FEATURES if name not in GENERAL)]
"""Constants that grow where ranks share cores."""
WORKERS = [2**power for power in range(1, 13)]
BANDWIDTHS = [1e8, 1e9, 1e10, 1e11]


@dataclass(frozen=True)
class Observation:
    """One method's median step in one piece, and what the model takes it to be made of."""

    piece: str
    method: Method
    job: Job
    seconds: float
    features: dict[str, float]
    """Those of the processor multiplied by how much slower it was here than with the fewest hosts."""

    def predicted(self, constants: Constants) -> float:
        """Seconds, by the model."""
        return self.job.compute + plan.seconds(self.features, constants)


def sizes(model: str) -> tuple[int, ...]:
    """Elements of each parameter."""
    return tuple(math.prod(shape) for shape in SHAPES[model]())


def observe(pieces: Sequence[Sequence[Timing]]) -> list[Observation]:
    """What there is to fit, of pieces between hosts that timed the step without an exchange."""
    alone = {}
    for timings in pieces:
        local = [timing.seconds for timing in timings if timing.method == LOCAL]
        if local and timings[0].rate != "memory":
            alone[id(timings)] = statistics.median(local)
    used = [timings for timings in pieces if id(timings) in alone]
    observations = []
    for timings in used:
        first, compute = timings[0], alone[id(timings)]
        alike = [other for other in used if other[0].model == first.model]
        fewest = min(other[0].workers for other in alike)
        usual = statistics.median(alone[id(other)] for other in alike if other[0].workers == fewest)
        job = Job(sizes(first.model), first.workers, bits_per_second(first.rate), compute)
        for row in summarize(timings):
            if row.method in PLANNED:
                features = PLANNED[row.method].features(job)
                features |= {name: features[name] * compute / usual for name in PROCESSOR}
                name = f"{first.model}, {first.rate}, {first.workers} hosts"
                observations.append(Observation(name, PLANNED[row.method], job, row.seconds.median, features))
    return observations


def nonnegative(matrix: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares without negative coefficients: the most negative one is put to 0 until none is."""
    active = np.flatnonzero(matrix.any(axis=0))
    solution = np.zeros(matrix.shape[1])
    while active.size:
        scale = np.linalg.norm(matrix[:, active], axis=0)
        found = np.linalg.lstsq(matrix[:, active] / scale, wanted, rcond=None)[0]
        if found.min() >= 0:
            solution[active] = found / scale
            break
        active = np.delete(active, found.argmin())
    return solution


def reference(observations: Sequence[Observation]) -> Job:
    """ResNet-50's shapes, if they were timed, on the fewest workers: what the predictions are of."""
    common = sizes("resnet50")
    return min((o.job for o in observations), key=lambda job: (job.sizes != common, job.workers))


def fit(
    observations: Sequence[Observation], source: str, known: Mapping[str, float] | None = None
) -> Constants:
    """The constants that are least wrong, relative to the step's time, beside those that are `known`."""
    given = dict(known or {})
    free = [name for name in FEATURES if name not in given]
    weights = np.array([1 / o.seconds for o in observations])
    matrix = np.array([[o.features[name] for name in free] for o in observations]) * weights[:, None]
    rest = [sum(o.features[name] * value for name, value in given.items()) for o in observations]
    wanted = np.array([o.seconds - o.job.compute for o in observations]) - np.array(rest)
    found = dict(zip(free, map(float, nonnegative(matrix, wanted * weights)), strict=True)) | given
    return Constants(
        {name: found[name] for name in FEATURES},
        source,
        device="processors, one thread a rank",
        network="MPI over TCP",
    )


def hidden(timings: Sequence[Timing]) -> float:
    """The share of the exchange that overlap hid: the median over rounds."""
    rounds: dict[int, dict[str, float]] = {}
    for timing in timings:
        rounds.setdefault(timing.round, {})[timing.method] = timing.seconds
    plain, behind = "sign DC", "sign DC, overlap"
    shares = [1 - (turn[behind] - turn[LOCAL]) / (turn[plain] - turn[LOCAL]) for turn in rounds.values()]
    return min(1.0, max(0.0, statistics.median(shares)))


def check_table(title: str, observations: Sequence[Observation], constants: Constants) -> list[str]:
    """Measured, predicted and how far off, each method in each piece; then the middle and the worst."""
    if not observations:
        return [f"{title}: none"]
    lines = [title, f"{'piece':<34}{'method':<24}{'measured':>12}{'MODEL':>12}{'off by':>10}"]
    for o in observations:
        model = o.predicted(constants)
        off = model / o.seconds - 1
        lines.append(f"{o.piece:<34}{o.method.name:<24}{o.seconds:>10.4f} s{model:>10.4f} s{off:>+10.1%}")
    errors = [abs(o.predicted(constants) / o.seconds - 1) for o in observations]
    lines.append(f"off by {statistics.median(errors):.1%} in the median, {max(errors):.1%} at worst")
    return lines


def bandwidth_text(bits: float) -> str:
    """10 Gbit/s."""
    return f"{bits / 1e9:.3g} Gbit/s"


def prediction_table(job: Job, constants: Constants) -> list[str]:
    """Step time by number of workers, of each method, at one bandwidth."""
    lines = [
        f"{LABEL}: seconds a step, {job.parameters / 1e6:.1f} M parameters, {bandwidth_text(job.bandwidth)}, "
        f"{job.compute:.3f} s of compute",
        f"{'workers':<20}" + "".join(f"{workers:>9}" for workers in WORKERS),
    ]
    for method in METHODS:
        times = [predict(method, _with(job, workers=workers), constants) for workers in WORKERS]
        lines.append(f"{method.name:<20}" + "".join(f"{time:>9.3f}" for time in times))
    return lines


def _with(job: Job, workers: int | None = None, bandwidth: float | None = None) -> Job:
    return dataclasses.replace(job, workers=workers or job.workers, bandwidth=bandwidth or job.bandwidth)


def paying_table(job: Job, constants: Constants) -> list[str]:
    """Where compression stops paying, by number of workers."""
    lines = [
        f"{LABEL}: the bandwidth above which no compressed method gains 5 % on Horovod float32, "
        f"{job.parameters / 1e6:.1f} M parameters, {job.compute:.3f} s of compute",
        f"{'workers':>8}{'stops paying at':>22}   the last that pays",
    ]
    for workers in WORKERS:
        bandwidth, name = stops_paying(_with(job, workers=workers), constants, METHODS)
        text = {0.0: "never pays", math.inf: "pays at 1 Tbit/s"}.get(bandwidth, bandwidth_text(bandwidth))
        lines.append(f"{workers:>8}{text:>22}   {name}")
    return lines


def plot(job: Job, constants: Constants, path: Path) -> None:
    """Predicted step time against workers, a bandwidth a panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, len(BANDWIDTHS), figsize=(4.5 * len(BANDWIDTHS), 4), sharey=True)
    for axes, bandwidth in zip(grid, BANDWIDTHS, strict=True):
        for method in METHODS:
            jobs = [_with(job, workers, bandwidth) for workers in WORKERS]
            dash = "--" if method.dense else ":" if method.averaging_period else "-"
            axes.plot(WORKERS, [predict(method, j, constants) for j in jobs], dash, label=method.name)
        axes.set(xscale="log", yscale="log", xlabel="workers", title=f"{LABEL}\n{bandwidth_text(bandwidth)}")
        axes.title.set_fontsize(9)
    grid[0].set_ylabel("predicted seconds a step")
    grid[-1].legend(fontsize=6)
    figure.tight_layout()
    save(figure, path)


def write_csv(job: Job, constants: Constants, path: Path) -> None:
    """All predictions."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "parameters", "compute", "bits_per_second", "workers", "method", "seconds"])
        for bandwidth in BANDWIDTHS:
            for workers in WORKERS:
                there = _with(job, workers, bandwidth)
                for method in METHODS:
                    row = [LABEL, job.parameters, job.compute, bandwidth, workers, method.name]
                    writer.writerow([*row, predict(method, there, constants)])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs = ROOT / "runs"
    parser.add_argument(
        "--runs", type=Path, default=runs / "cluster", help="the folder with cluster.py's CSVs"
    )
    parser.add_argument("--unseen-hosts", nargs="*", type=int, default=[8], help="not fitted on, but checked")
    parser.add_argument("--unseen-rates", nargs="*", default=["10gbit"], help="not fitted on, but checked")
    parser.add_argument("--compute", type=float, help="seconds, for predictions; as measured if not given")
    parser.add_argument("--out", type=Path, default=runs / "scaling", help="folder for results")
    results = ROOT / "benchmarks" / "results"
    parser.add_argument(
        "--known",
        type=Path,
        help="a file of `hvd-saef calibrate`: what is not fitted; an estimate if not given",
    )
    parser.add_argument(
        "--overlap", type=Path, default=results / "overlap" / "overlap.csv", help="what overlap hides"
    )
    parser.add_argument("--note", help="what is to be said of the runs wherever the fit is shown")
    parser.add_argument("--save", action="store_true", help="write hvd_saef/planning/plan.json as well")
    return parser.parse_args()


def main() -> int:
    """Fit, check, predict."""
    args = arguments()
    files = [file for file in sorted(args.runs.glob("*.csv")) if not file.name.startswith("cluster")]
    pieces = [read(file) for file in files]
    unseen = {
        id(piece)
        for piece in pieces
        if piece[0].workers in args.unseen_hosts or piece[0].rate in args.unseen_rates
    }
    everything = observe(pieces)
    kept_back = {o.piece for o in observe([piece for piece in pieces if id(piece) in unseen])}
    seen = [o for o in everything if o.piece not in kept_back]
    if not seen:
        print(f"scaling.py: nothing to fit in {args.runs}: run benchmarks/cluster.py first", file=sys.stderr)
        return 1
    names = list(dict.fromkeys(o.piece for o in seen))
    source = f"{len(seen)} medians of benchmarks/cluster.py ({'; '.join(names)})"
    note = f"{source}, {args.note}" if args.note else source
    known, estimated = dict(ETHERNET), tuple(ETHERNET)
    if args.known:
        known, estimated = {name: Constants.load(args.known).seconds[name] for name in ETHERNET}, ()
    constants = dataclasses.replace(
        fit(seen, note, known), hidden=hidden(read(args.overlap)), estimated=estimated
    )
    job = reference(seen)
    if args.compute is not None:
        job = dataclasses.replace(job, compute=args.compute)
    blocks = [
        check_table("What it was fitted on", seen, constants),
        check_table("What it had not seen", [o for o in everything if o.piece in kept_back], constants),
        *(prediction_table(_with(job, bandwidth=bandwidth), constants) for bandwidth in BANDWIDTHS),
        paying_table(job, constants),
    ]
    text = "\n\n".join("\n".join(block) for block in blocks)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling.txt").write_text(text + "\n")
    constants.save(args.out / "constants.json")
    if args.save:
        constants.save(ROOT / "hvd_saef" / "planning" / "plan.json")
    write_csv(job, constants, args.out / "predictions.csv")
    plot(job, constants, args.out / "scaling.png")
    print(text, f"\n\nWritten: {args.out}/scaling.txt, constants.json, predictions.csv, scaling.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
