"""Runs a command's pieces, each in a process of its own, and keeps what they found.

So a piece that crashes, hangs or loses the device takes no other with it. Each piece has a limit, and all of
them together have one. Rows are written as they come, as JSON and as a table: what was found before an end of
any kind is there, and --resume does what is missing. Needs torch alone; a progress bar where there is tqdm.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
LOOK = 0.1
"""Seconds between two looks at what a piece has found."""
END = 5.0
"""Seconds that are left to write, in which no piece is started."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a piece works, and how much it does."""

    device: torch.device
    tiny: bool
    """True: sizes that an interpreter of kernels can do, to see whether everything runs."""

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Waits until the device has done what it was asked."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Piece:
    """A part of a command."""

    name: str
    seconds: float
    """The most that it may take on a GPU."""
    work: Callable[[Place], Iterator[Row]]
    """Yields its rows as it finds them; runs in a process of its own."""


@dataclass(frozen=True)
class Command:
    """A command of several pieces."""

    module: str
    """What `python -m` starts."""
    about: str
    pieces: Sequence[Piece]
    name: str
    """Of the files that it writes."""
    table: Callable[[Sequence[Row]], str]
    line: Callable[[Row], str]
    """A row in a line, to be shown as it comes."""
    failed: Callable[[Row], bool] = lambda row: False
    """Whether a row makes the command fail."""
    summary: Callable[[Sequence[Row]], Any] = lambda rows: None
    """What follows from the rows; stands in the JSON, too."""
    at_once: int = 1
    """How many pieces may run at a time where there are four cores for each: what is timed runs alone."""
    after: Callable[[Sequence[Row], Path], str] = lambda rows, folder: ""
    """What is done last with all rows, in the folder of the files; returns what to say of it."""

    def main(self) -> int:
        """Runs the command, or in a child one piece; returns the exit code."""
        options = self._arguments()
        device = torch.device(options.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", 0)
        if options.piece:
            place = Place(device, options.tiny or device.type == "cpu")
            piece = next(piece for piece in self.pieces if piece.name == options.piece)
            with open(options.rows, "a") as file:
                for row in piece.work(place):
                    file.write(json.dumps({"piece": piece.name, **row}) + "\n")
                    file.flush()
            return 0
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an outer limit: end what runs
        try:
            return _Run(self, options).run()
        finally:
            signal.signal(signal.SIGTERM, before)

    def _arguments(self) -> argparse.Namespace:
        names = [piece.name for piece in self.pieces]
        parser = argparse.ArgumentParser(prog=f"python -m {self.module}", description=self.about)
        parser.add_argument("--device", default="cuda", help="cuda, or cpu to see whether everything runs")
        parser.add_argument("--tiny", action="store_true", help="small sizes, as on the CPU")
        parser.add_argument(
            "--only", nargs="+", choices=names, default=names, metavar="PIECE", help=f"{names}"
        )
        parser.add_argument("--seconds", type=float, default=460.0, help="the limit of all (default 460)")
        parser.add_argument("--resume", action="store_true", help="leave out pieces that --out has whole")
        parser.add_argument("--out", type=Path, default=ROOT / "runs" / self.name)
        parser.add_argument("--piece", choices=names, help=argparse.SUPPRESS)
        parser.add_argument("--rows", help=argparse.SUPPRESS)
        return parser.parse_args()


class _Run:
    """One run of a command, and what it has found so far."""

    def __init__(self, command: Command, options: argparse.Namespace) -> None:
        self.command, self.options = command, options
        self.path = Path(options.out) / f"{command.name}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self.ended: dict[str, dict[str, Any]] = {}
        if options.resume and self.path.exists():
            found = json.loads(self.path.read_text())
            self.ended = {name: end for name, end in found["pieces"].items() if end["outcome"] == "done"}
            self.rows = [row for row in found["rows"] if row["piece"] in self.ended]
        self.bar = _Bar(len(options.only))
        self.running: list[subprocess.Popen[bytes]] = []
        self._writing = threading.Lock()

    def run(self) -> int:
        """Runs the pieces; returns 1 if any failed, 2 if there is no such device, else 0."""
        deadline = time.monotonic() + self.options.seconds
        pieces = [one for one in self.command.pieces if one.name in self.options.only]
        first = [one for one in pieces if one is self.command.pieces[0]]  # it may build what others need
        others = [one for one in pieces if one not in first]
        cores = len(os.sched_getaffinity(0))
        threads = ThreadPoolExecutor(max(1, min(self.command.at_once, cores // 4)))
        try:
            for group in (first, others):
                list(threads.map(lambda piece: self._take_turn(piece, deadline), group))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in list(self.running):
                _end_all(process)
        self.bar.close()
        self._save()
        print(f"\n{self._text()}\nWritten: {self.path} and {self.path.with_suffix('.txt')}")
        print(self.command.after(self.rows, self.path.parent), end="")
        if self._absent():
            return 2
        outcomes = {self.ended[name]["outcome"] for name in self.options.only}
        return int(bool(outcomes - {"done"}) or any(map(self.command.failed, self.rows)))

    def _take_turn(self, piece: Piece, deadline: float) -> None:
        """Runs a piece, if there is any need, time and device."""
        left, absent = deadline - time.monotonic() - END, self._absent()
        if piece.name in self.ended:
            pass
        elif absent:
            self._end(piece, "skipped", absent, 0.0)
        elif left < END:
            self._end(piece, "not run", f"no time was left of --seconds {self.options.seconds:g}", 0.0)
        else:
            self.bar.begins(piece.name)
            self._run(piece, min(piece.seconds, left))
        self.bar.ended()

    def _absent(self) -> str:
        """Why the device cannot be used, or nothing."""
        if torch.device(self.options.device).type != "cuda" or torch.cuda.is_available():
            return ""
        return f"no GPU: torch {torch.__version__} finds none (--device cpu runs the same code, tiny)"

    def _run(self, piece: Piece, limit: float) -> None:
        """Runs a piece in a process of its own, which ends with all that it started."""
        start = time.monotonic()
        with (
            tempfile.TemporaryDirectory() as folder,
            open(self.path.with_name(piece.name + ".log"), "w") as log,
        ):
            found = Path(folder, "rows")
            found.touch()
            process = subprocess.Popen(
                [sys.executable, "-m", self.command.module, *self._passed_on(piece, found)],
                cwd=ROOT,
                env=os.environ | environment(self.options.device),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running.append(process)
            try:
                with open(found) as lines:
                    while process.poll() is None and time.monotonic() - start < limit:
                        self._take(lines)
                        time.sleep(LOOK)
                    late = process.poll() is None
                    self._take(lines)
            finally:
                _end_all(process)
                self.running.remove(process)
        seconds = time.monotonic() - start
        if late:
            self._end(piece, "out of time", f"ended after its limit of {limit:.0f} s", seconds)
        elif process.returncode:
            said = self.path.with_name(piece.name + ".log").read_text().strip().splitlines()[-8:]
            self._end(piece, "failed", "\n".join([f"exit code {process.returncode}", *said]), seconds)
        else:
            self._end(piece, "done", "", seconds)

    def _passed_on(self, piece: Piece, found: Path) -> list[str]:
        passed = ["--piece", piece.name, "--rows", str(found), "--device", self.options.device]
        return [*passed, *(["--tiny"] if self.options.tiny else [])]

    def _take(self, lines: Any) -> None:
        """Takes the rows that are there."""
        for row in arrived(lines):
            with self._writing:
                self.rows.append(row)
                self.bar.says(self.command.line(row))
                self._save()

    def _end(self, piece: Piece, outcome: str, detail: str, seconds: float) -> None:
        with self._writing:
            self.ended[piece.name] = {"outcome": outcome, "detail": detail, "seconds": round(seconds, 2)}
            if outcome != "done":
                self.bar.says(f"{piece.name}: {outcome}: {detail}")
            self._save()

    def _save(self) -> None:
        """Writes everything, each file whole or not at all."""
        found = {
            "command": [self.command.module, *sys.argv[1:]],
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "pieces": self.ended,
            "rows": self.rows,
            "summary": self.command.summary(self.rows),
        }
        for path, text in (
            (self.path, json.dumps(found, indent=1)),
            (self.path.with_suffix(".txt"), self._text()),
        ):
            unfinished = path.with_name(path.name + ".unfinished")
            unfinished.write_text(text + "\n")
            unfinished.replace(path)

    def _text(self) -> str:
        """The table, and what became of each piece."""
        lines = [self.command.table(self.rows), ""]
        for name, end in self.ended.items():
            lines.append(f"{name}: {end['outcome']}, {end['seconds']:.0f} s {end['detail']}".rstrip())
        return "\n".join(lines)


def _end_all(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def arrived(lines: Any) -> Iterator[Row]:
    """Yields the rows of a file that is being written, from where it was read last; not a row's beginning."""
    while True:
        place = lines.tell()
        line = lines.readline()
        if not line.endswith("\n"):
            lines.seek(place)
            return
        yield json.loads(line)


def environment(device: str) -> Mapping[str, str]:
    """What a process that works on the device is given beside the environment."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    on_cpu = torch.device(device).type == "cpu"
    same_bits = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # of products of matrices, in each run
    return {"PYTHONPATH": path, "TRITON_INTERPRET": "1" if on_cpu else "0"} | same_bits


class _Bar:
    """A progress bar, where tqdm is there; without it, lines."""

    def __init__(self, pieces: int) -> None:
        self._bar: Any = None
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            self._bar = tqdm(total=pieces, unit="piece", file=sys.stderr, disable=None)

    def begins(self, name: str) -> None:
        """Names the piece under way."""
        if self._bar is not None:
            self._bar.set_description(name)
        else:
            self.says(f"{name}:")

    def says(self, line: str) -> None:
        """Shows a line."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line)
        sys.stdout.flush()

    def ended(self) -> None:
        """Another piece is over."""
        if self._bar is not None:
            self._bar.update()

    def close(self) -> None:
        """At the end."""
        if self._bar is not None:
            self._bar.close()
