"""Does real damage to real jobs, counts what came of it, and writes the table of docs/reliability.md.

python -m tests.mpi.faults [--repeat 3] [--kills 200] [--out docs/reliability]
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks.hosts import INTERFACE, Hosts, why_not
from tests.mpi.launch import ENVIRONMENT, ROOT
from tests.saver import kill_jobs

PATIENCE = {"HVD_SAEF_STALL_WARNING_S": "1", "HVD_SAEF_STALL_ABORT_S": "3"}
TIMEOUT = 90.0
CUT_TIMEOUT = 30.0


@dataclass
class Row:
    """What came of one kind of fault."""

    fault: str
    ranks: int
    tried: int
    as_promised: int
    """Ended with the right words, or went on to the same bits."""
    bytes_lost: int | None
    """Of complete checkpoints."""
    seconds: float | None
    """From the fault to the job's end; the median."""


PROMISES = {
    "sigkill": (False, "signal 9", {}),
    "exception": (False, "disk is gone", {}),
    "early-end": (False, "ended before the agreement of all ranks, round 4", {}),
    "sigstop": (False, "did not arrive", PATIENCE),
    "hang": (False, "did not arrive", PATIENCE),
    "never-wraps": (False, "did not arrive", PATIENCE),
    "pause": (True, "did not arrive", {"HVD_SAEF_STALL_WARNING_S": "1"}),
}
"""By fault: whether the job survives, what it says, and the settings."""


def victim(fault: str, folder: Path) -> list[str]:
    """The job in which it happens."""
    return [sys.executable, "-m", "tests.mpi.victim", fault, str(folder)]


def happen(fault: str, ranks: int, repeat: int) -> Row:
    """A fault of PROMISES, so many times."""
    survives, words, environment = PROMISES[fault]
    kept, seconds = 0, []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = ["mpirun", "-np", str(ranks), *victim(fault, folder)]
            job = subprocess.run(
                command,
                cwd=ROOT,
                env=ENVIRONMENT | environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
            seconds.append(time.time() - float((folder / "fault").read_text()))
            ends = {path.read_bytes() for path in folder.glob("end-*")}
            kept += (job.returncode == 0) == survives and words in job.stdout + job.stderr
            kept -= survives and len(ends) != 1
    return Row(fault, ranks, repeat, kept, None, statistics.median(seconds))


def cut_link(repeat: int) -> Row:
    """The link of the second of two hosts goes down in the middle of training."""
    kept, seconds = 0, []
    for _ in range(repeat):
        with Hosts(2, "1gbit") as hosts, tempfile.TemporaryDirectory() as name:
            folder, output = Path(name), Path(name, "said")

            ended: list[float] = []

            def cut(
                folder: Path = folder,
                output: Path = output,
                ended: list[float] = ended,
                namespace: str = hosts.namespace("h1"),
            ) -> None:
                deadline = time.monotonic() + TIMEOUT
                while not (folder / "fault").exists() and time.monotonic() < deadline:
                    time.sleep(0.01)
                subprocess.run(["ip", "-n", namespace, "link", "set", INTERFACE, "down"], check=True)
                while "ends the job." not in output.read_text() and time.monotonic() < deadline:
                    time.sleep(0.05)
                ended.append(time.time())

            watcher = threading.Thread(target=cut)
            watcher.start()
            # The launcher itself may wait for the host that is cut off: it is not ours to end.
            with open(output, "w") as said, contextlib.suppress(subprocess.TimeoutExpired):
                hosts.run(
                    hosts.mpirun(victim("cut", folder)),
                    CUT_TIMEOUT,
                    output=said,
                    environment=PATIENCE | {"PYTHONPATH": str(ROOT)},
                )
            text = output.read_text()
            watcher.join(1)
            seconds += [end - float((folder / "fault").read_text()) for end in ended]
            kept += "did not arrive" in text and "ends the job." in text
    return Row(
        "link cut between 2 hosts", 2, repeat, kept, None, statistics.median(seconds) if seconds else None
    )


def killed_savers(kills: int, ranks: int) -> Row:
    """Kill -9 at random moments of saves."""
    if ranks == 1:
        command = [sys.executable, "-W", "ignore", "-m", "tests.saver", str(kills)]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        loaded, ranks = json.loads(done.stdout)["loaded"], 2
        name = "kill -9 of 2 workers (threads) that save"
    else:
        with tempfile.TemporaryDirectory() as folder:
            loaded = kill_jobs(kills, ranks, Path(folder))
        name = "kill -9 of a rank that saves"
    return Row(name, ranks, kills, loaded, 0 if loaded == kills else None, None)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability")
    args = parser.parse_args()
    os.chdir(ROOT)
    rows: list[Row] = []
    todo: list[Callable[[], Row]] = [lambda: killed_savers(args.kills, 1)]
    todo += [partial(killed_savers, max(1, args.kills // 20), ranks) for ranks in (2, 4)]
    if why_not() is None:
        todo.append(lambda: cut_link(args.repeat))
    todo += [partial(happen, fault, ranks, args.repeat) for ranks in (2, 4) for fault in PROMISES]
    for do in tqdm(todo, desc="faults"):
        rows.append(do())
        write(rows, args.out)  # what there is, should a later one fail
    print(args.out.with_suffix(".txt").read_text(), end="")
    sys.exit(any(row.as_promised != row.tried for row in rows))


def write(rows: list[Row], out: Path) -> None:
    """The table, and its numbers."""
    with open(out.with_suffix(".csv"), "w", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Row)])
        table.writeheader()
        table.writerows(asdict(row) for row in rows)
    lines = [f"{'fault':42}{'ranks':>6}{'tried':>7}{'as promised':>13}{'bytes lost':>12}{'seconds':>9}"]
    for row in rows:
        lost = "-" if row.bytes_lost is None else str(row.bytes_lost)
        took = "-" if row.seconds is None else f"{row.seconds:.1f}"
        lines.append(f"{row.fault:42}{row.ranks:6}{row.tried:7}{row.as_promised:13}{lost:>12}{took:>9}")
    out.with_suffix(".txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
