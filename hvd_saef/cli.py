"""The command `hvd-saef`: `plan` predicts which method saves time, with constants that `calibrate` measures.

`doctor` checks the environment.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hvd_saef.planning.constants import FEATURES, OF_DEVICES, Constants
from hvd_saef.planning.plan import (
    TENSOR,
    UNCOMPRESSED,
    Job,
    Method,
    methods,
    predict,
    recommend,
    stops_paying,
)

FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
INSIDE = 1e11
"""The bits a second that a rank sends inside a node, where nobody says otherwise."""
LOCAL_STEPS = 8
"""The H of the advice on local steps."""
MOST_TENSORS = 1000
"""The most tensors that a model is assumed to have."""
MANY_BUCKETS = 64
"""More buckets than this are worth larger ones: each has its messages."""


def count(text: str) -> int:
    """Reads a number of elements or ranks: "25.6M" becomes 25600000."""
    match = re.fullmatch(r"([0-9.]+)\s*([kmgbt]?)", text.strip(), re.IGNORECASE)
    try:
        number = round(float(match[1]) * FACTORS[match[2].lower()]) if match else 0
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number >= 1 is allowed, as 25600000, 25.6M or 7B")
    return number


def bandwidth(text: str) -> float:
    """Reads a rate: "10Gbit" becomes 1e10 bits a second."""
    match = re.fullmatch(r"([0-9.]+)\s*([kmgt]?)bit(?:/s)?", text.strip(), re.IGNORECASE)
    try:
        number = float(match[1]) * FACTORS[match[2].lower()] if match else 0.0
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a rate is allowed, as 100Mbit, 10Gbit or 25Gbit/s")
    return number


def duration(text: str) -> float:
    """Reads a number of seconds."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: a number of seconds >= 0 is allowed")
    return number


def constants(text: str) -> Constants:
    """Reads the model's constants from the file that `text` names."""
    try:
        return Constants.load(Path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def table(job: Job, known: Constants, choice: Sequence[Method]) -> str:
    """Returns a table of the methods, the least lossy first: bytes sent, predicted step and gain."""
    plain = predict(UNCOMPRESSED, job, known)
    lines = [f"{'method':<25}{'p':>5}{'MB sent':>12}{'step':>12}{'exchange':>12}{'gain':>9}"]
    for method in choice:
        step = predict(method, job, known)
        sent = method.bytes_between_nodes(job) / 1e6
        lines.append(
            f"{method.name:<25}{method.averaging_period or '-':>5}{sent:>12.3f}"
            f"{step:>10.4f} s{step - job.compute:>10.4f} s{plain / step:>8.2f}×"
        )
    return "\n".join(lines)


def origin(known: Constants) -> list[str]:
    """Returns lines that say whose constants these are, and how to get others."""
    lines = [f"Its constants: {known.device}; {known.network}.", f"Where from: {known.source}."]
    if known.estimated:
        all_of_them = len(known.estimated) > len(FEATURES)
        what = "all of them" if all_of_them else ", ".join(known.estimated)
        lines.append(f"ESTIMATED, not measured: {what}.")
    if not known.made:
        others = " or ".join(f"--device {name}" for name in OF_DEVICES)
        lines.append(f"{others} chooses; `hvd-saef calibrate`, started as your job is, measures your own.")
    return lines


def advice(job: Job, known: Constants, args: argparse.Namespace) -> list[str]:
    """Returns the recommended method in words, and what overlap and local steps would make of it."""
    best = recommend(job, known, args.local_steps, args.overlap)
    plain = predict(UNCOMPRESSED, job, known)
    if best is UNCOMPRESSED:
        return [
            "Advice: do not compress: no method is predicted to be more than 5 % faster than Horovod's "
            "float32."
        ]
    gain = plain / predict(best, job, known)
    lines = [
        f"Advice: {best.name}, predicted {gain:.2f}× faster than Horovod's float32",
        f"  {best.call}",
    ]
    if best.dense:
        return lines
    more = {} if best.overlap else {"overlap=True": replace(best, overlap=True)}
    if best.local_steps == 1:
        more[f"local_steps={LOCAL_STEPS}"] = replace(best, local_steps=LOCAL_STEPS)
    larger = best.bucket_bytes
    while 4 * job.parameters > MANY_BUCKETS * larger:
        larger *= 2
    if larger > best.bucket_bytes:
        more[f"bucket_bytes={larger}"] = replace(best, bucket_bytes=larger)
    lines += [
        f"  With {words} as well: {predict(other, job, known):.4f} s a step." for words, other in more.items()
    ]
    return lines


def break_even(job: Job, known: Constants, choice: Sequence[Method]) -> str:
    """Returns in words the bandwidth above which compression does not pay."""
    bandwidth, name = stops_paying(job, known, choice)
    if bandwidth == 0:
        return "No compressed method gains 5 % on Horovod's float32 at any bandwidth."
    if bandwidth == float("inf"):
        return f"Compression gains 5 % on Horovod's float32 even at 1 Tbit/s ({name})."
    return f"Above {bandwidth / 1e9:.3g} Gbit/s no compressed method gains 5 % on Horovod's float32."


def plan(args: argparse.Namespace) -> str:
    """Returns what `hvd-saef plan` prints."""
    known: Constants = args.constants
    tensors = min(MOST_TENSORS, max(1, round(args.parameters / TENSOR)))
    sizes = [args.parameters // tensors] * (tensors - 1)
    job = Job(
        (*sizes, args.parameters - sum(sizes)),
        args.workers,
        args.bandwidth,
        args.compute,
        args.ranks_per_node,
        args.inside,
    )
    where = f"{args.workers} workers that send {args.bandwidth / 1e9:g} Gbit/s"
    if args.ranks_per_node > 1:
        where = (
            f"{args.workers} ranks, {args.ranks_per_node} a node, whose nodes send {args.bandwidth / 1e9:g} "
            f"Gbit/s (each rank {args.inside / 1e9:g} inside)"
        )
    asked = f" every {args.local_steps} steps" if args.local_steps > 1 else ""
    asked += ", with overlap" if args.overlap else ""
    if asked:
        where += f" (this library's methods{asked})"
    choice, share = methods(job, args.local_steps, args.overlap), f"{100 * known.hidden:.0f} %"
    return "\n".join(
        [
            f"A step of {args.parameters / 1e6:g} M parameters on {where} and compute {args.compute:g} s:",
            "predictions of a MODEL, not measurements.",
            *origin(known),
            "",
            table(job, known, choice),
            "",
            *advice(job, known, args),
            break_even(job, known, choice),
            "The advice is the least lossy method whose step is within 5 % of the fastest. What a method",
            "costs in convergence is not in the model. p is the averaging period (rounds).",
            f"With overlap, {share} of an exchange hides behind backward; Horovod always overlaps.",
        ]
    )


def run_plan(args: argparse.Namespace) -> int:
    """Prints the plan; returns the exit code."""
    if args.constants is None:
        args.device = args.device or ("gpu" if torch.cuda.is_available() else "cpu")
        args.constants = OF_DEVICES[args.device]()
    args.bandwidth = args.bandwidth or args.constants.bandwidth
    args.inside = args.inside or args.constants.inside or INSIDE
    if args.bandwidth is None:
        args.fail("--bandwidth is needed: --bandwidth 10Gbit; a file of `calibrate` on several hosts has it")
    if args.workers % args.ranks_per_node:
        args.fail(f"--ranks-per-node {args.ranks_per_node}: a divisor of --workers {args.workers} is allowed")
    print(plan(args))
    return 0


def run_calibrate(args: argparse.Namespace) -> int:
    """Measures the constants and writes them on rank 0; returns the exit code. Collective."""
    from hvd_saef.planning import calibrate  # this import is not cheap, and no other command needs it

    return calibrate.run(args.out, args.seconds)


def run_doctor(args: argparse.Namespace) -> int:
    """Prints the report on rank 0; returns the exit code, the same on all ranks. Collective."""
    from hvd_saef import doctor  # this import starts MPI, which no other command needs

    return doctor.run(as_json=args.json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` (None is the process's own); returns the exit code."""
    parser = argparse.ArgumentParser(prog="hvd-saef", description="Compressed training on Horovod and MPI.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "plan",
        help="which method, p and k would pay",
        description="Predicts a step's time by method, with a latency-bandwidth-compute model that was "
        "fitted on measured steps, and says which method would pay, or that none would.",
    )
    command.add_argument("--parameters", type=count, required=True, help="of the model: 25.6M")
    command.add_argument("--workers", type=count, required=True, help="ranks that exchange")
    command.add_argument(
        "--bandwidth", type=bandwidth, help="that a node can send: 10Gbit; as calibrated if not given"
    )
    command.add_argument("--ranks-per-node", type=count, default=1, help="which share that bandwidth")
    command.add_argument(
        "--inside",
        type=bandwidth,
        help="that a rank can send inside a node: as calibrated, or 100Gbit, if not given",
    )
    command.add_argument(
        "--compute", type=duration, required=True, help="seconds of a step without any exchange"
    )
    command.add_argument("--local-steps", type=count, default=1, help="H, of this library's methods")
    command.add_argument("--overlap", action="store_true", help="of this library's methods")
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--device", choices=OF_DEVICES, help="whose constants: what torch sees here if not given"
    )
    which.add_argument("--constants", type=constants, help="a file that `hvd-saef calibrate` wrote")
    command.set_defaults(run=run_plan, fail=command.error)
    command = commands.add_parser(
        "doctor",
        help="whether what is installed fits together",
        description="Looks at torch, Horovod, MPI, kernels, cores and network, and says what to do where "
        "something is wrong. Under mpirun or srun it compares all ranks and times the links between all "
        "hosts. Exit code 1 if anything is a failure, else 0.",
    )
    command.add_argument("--json", action="store_true", help="print everything as JSON")
    command.set_defaults(run=run_doctor)
    command = commands.add_parser(
        "calibrate",
        help="measure plan's constants on your ranks",
        description="Measures on the ranks of a job, within two minutes, what the model of `plan` is made "
        "of: latencies, rates, allreduces, encoding, whole steps. Start it as the job is started: by srun, "
        "mpirun, horovodrun or torchrun, on the same hosts. Rank 0 writes the file that `plan --constants` "
        "takes.",
    )
    command.add_argument(
        "--out", type=Path, default=Path("constants.json"), help="the file, on rank 0 (constants.json)"
    )
    command.add_argument("--seconds", type=duration, default=60.0, help="it may take, about (60)")
    command.set_defaults(run=run_calibrate)
    args = parser.parse_args(arguments)
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
