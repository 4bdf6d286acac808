"""Does real damage to real jobs, counts what came of it, and writes the table of docs/reliability.md.

python -m tests.mpi.faults [--repeat 3] [--kills 200] [--only WORD] [--out docs/reliability]
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks.hosts import Hosts, why_not
from tests.mpi.launch import LIMIT, MPIRUN, ROOT, run_job
from tests.saver import kill_jobs

PATIENCE = {"HVD_SAEF_STALL_WARNING_S": "1", "HVD_SAEF_STALL_ABORT_S": "3"}
HOURS = 4 * 3600.0
GRACE = 1.0
"""Seconds for the launcher to pass on what the ranks said."""
KILLED_THREADS = "kill -9 of 2 workers (threads) that save"
KILLED_RANK = "kill -9 of a rank that saves"
CUT = "link cut between 2 hosts"


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
    """From the fault to the job's end (of a link: until the others gave up); the median."""


PROMISES = {
    "sigkill": (False, "(signal|SIGNAL:) 9", {}),
    "exception": (False, "disk is gone", {}),
    "early-end": (False, "ended before the agreement of all ranks, round 4", {}),
    "sigstop": (False, "did not arrive", PATIENCE),
    "hang": (False, "did not arrive", PATIENCE),
    "never-wraps": (False, "did not arrive", PATIENCE),
    "pause": (True, "did not arrive", {"HVD_SAEF_STALL_WARNING_S": "1"}),
}
"""By fault: whether the job survives, what it says (a pattern), and the settings."""


def victim(fault: str, folder: Path) -> list[str]:
    """The job in which it happens."""
    return [sys.executable, "-m", "tests.transport.victim", fault, str(folder)]


def happen(fault: str, ranks: int, repeat: int) -> Row:
    """A fault of PROMISES, so many times."""
    survives, words, environment = PROMISES[fault]
    kept, seconds = 0, []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            job = run_job([MPIRUN, "-np", str(ranks), *victim(fault, folder)], environment=environment)
            seconds.append(time.time() - float((folder / "fault").read_text()))
            ends = {path.read_bytes() for path in folder.glob("end-*")}
            kept += (job.returncode == 0) == survives and bool(re.search(words, job.stdout + job.stderr))
            kept -= survives and len(ends) != 1
    return Row(fault, ranks, repeat, kept, None, statistics.median(seconds))


def cut_link(ranks: int, carrier: str = "mpi") -> tuple[dict[str, str], float]:
    """Take the second of two hosts off the net in the middle of training, on `ranks` ranks of both.

    `carrier` is "mpi" or "torch". Returns what was said, by host (with MPI, on the launcher's host alone),
    and the seconds from the cut until the ranks there had given up. All that is left is ended then: mpirun
    would wait for the daemon of a host that does not answer.
    """
    with Hosts(2, "1gbit") as hosts, tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as threads:
        folder = Path(name)
        starts = {"h0": hosts.mpirun(victim("cut", folder), ranks // 2)}
        if carrier == "torch":
            starts = {
                host: hosts.torch_ranks(victim("cut", folder), host, ranks // 2) for host in hosts.names
            }
        environment = PATIENCE | {"PYTHONPATH": str(ROOT)}
        took = math.nan
        with contextlib.ExitStack() as files:
            said = {host: files.enter_context(open(folder / f"said-{host}", "w")) for host in starts}
            jobs = {
                host: threads.submit(hosts.run, start, LIMIT, host, said[host], environment)
                for host, start in starts.items()
            }
            words = {host: Path(output.name) for host, output in said.items()}

            def all_end() -> bool:
                return all("ends the job." in path.read_text() for path in words.values())

            try:
                if _wait_for((folder / "fault").exists, jobs["h0"]):
                    switch = hosts.namespace("switch")
                    subprocess.run(["ip", "-n", switch, "link", "set", "to-h1", "down"], check=True)
                    start = time.monotonic()
                    (folder / "cut").touch()
                    if _wait_for(all_end, *jobs.values()):
                        took = time.monotonic() - start
                        time.sleep(GRACE)  # all that is promised was said: more words may come, or not
            finally:
                for host in hosts.names:
                    hosts.end(host)
            for job in jobs.values():
                job.result()
        return {host: path.read_text() for host, path in words.items()}, took


def _wait_for(happened: Callable[[], bool], *jobs: Future[int]) -> bool:
    """Whether it did before all these were over, and LIMIT."""
    deadline = time.monotonic() + LIMIT
    while not happened():
        if all(job.done() for job in jobs) or time.monotonic() > deadline:
            return happened()
        time.sleep(0.02)
    return True


def cut_links(ranks: int, repeat: int) -> Row:
    """:func:`cut_link`, so many times."""
    kept, seconds = 0, []
    for _ in range(repeat):
        said, took = cut_link(ranks)
        missing = ", ".join(map(str, range(ranks // 2, ranks)))
        words = f"rank{'s' if ranks > 2 else ''} {missing} did not arrive"
        kept += words in said["h0"] and "StalledExchangeError" in said["h0"] and not math.isnan(took)
        seconds.append(took)
    return Row(CUT, ranks, repeat, kept, None, statistics.median(seconds))


def killed_savers(fault: str, kills: int, ranks: int) -> Row:
    """Kill -9 at random moments of saves."""
    if fault == KILLED_THREADS:
        done = run_job([sys.executable, "-W", "ignore", "-m", "tests.saver", str(kills)], HOURS)
        loaded = json.loads(done.stdout)["loaded"]
    else:
        with tempfile.TemporaryDirectory() as folder:
            loaded = kill_jobs(kills, ranks, Path(folder))
    return Row(fault, ranks, kills, loaded, 0 if loaded == kills else None, None)


def everything(kills: int, repeat: int) -> dict[tuple[str, int], Callable[[], Row]]:
    """How to try each fault on so many ranks."""
    todo: dict[tuple[str, int], Callable[[], Row]] = {}
    todo[KILLED_THREADS, 2] = partial(killed_savers, KILLED_THREADS, kills, 2)
    for ranks in (2, 4):
        todo[KILLED_RANK, ranks] = partial(killed_savers, KILLED_RANK, max(1, kills // 2), ranks)
    for ranks in (2, 4):
        if why_not() is None:
            todo[CUT, ranks] = partial(cut_links, ranks, repeat)
        todo |= {(fault, ranks): partial(happen, fault, ranks, repeat) for fault in PROMISES}
    return todo


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", default="", help="faults with this in their name; other rows stay")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability")
    args = parser.parse_args()
    os.chdir(ROOT)
    if (reason := why_not()) is not None:
        print(f"no link is cut: {reason}", file=sys.stderr)
    todo = everything(args.kills, args.repeat)
    rows = read(args.out) if args.only else {}
    for key in tqdm([key for key in todo if args.only in key[0]], desc="faults"):
        rows[key] = todo[key]()
        write([rows[key] for key in todo if key in rows], args.out)  # what there is, should a later one fail
    print(args.out.with_suffix(".txt").read_text(), end="")
    sys.exit(any(row.as_promised != row.tried for row in rows.values()))


def read(out: Path) -> dict[tuple[str, int], Row]:
    """The rows of an earlier run, if there are any."""
    rows: dict[tuple[str, int], Row] = {}
    with contextlib.suppress(FileNotFoundError), open(out.with_suffix(".csv"), newline="") as file:
        for line in csv.DictReader(file):
            row = Row(
                fault=line["fault"],
                ranks=int(line["ranks"]),
                tried=int(line["tried"]),
                as_promised=int(line["as_promised"]),
                bytes_lost=int(line["bytes_lost"]) if line["bytes_lost"] else None,
                seconds=float(line["seconds"]) if line["seconds"] else None,
            )
            rows[row.fault, row.ranks] = row
    return rows


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
