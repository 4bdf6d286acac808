"""A program run in the library, by threads, and then held against the model, action by action."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.machine.actions import Action
from tests.machine.model import Reference
from tests.machine.net import NAMES, Vec
from tests.machine.options import Options
from tests.machine.reference import Over, Refused
from tests.machine.worker import Board, Record, Worker
from tests.oracle import Array
from tests.workers import together

CLOSE = 1e-9
GOES_ON = ("", "NonFiniteUpdateError", "Oops", "WorkerError", "RuntimeError", "ValueError", "CheckpointError")
"""After any other exception a rank is done, so that those who wait for it are told."""


@dataclass(frozen=True)
class Program:
    """What to run."""

    options: Options
    actions: tuple[Action, ...]

    def code(self) -> str:
        """As Python that can be put into a test."""
        lines = "".join(f"        {action!r},\n" for action in self.actions)
        return f"Program(\n    {self.options!r},\n    (\n{lines}    ),\n)"


def run(program: Program) -> list[list[Record]]:
    """What each rank saw after each action."""
    board = Board(program.options.size)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return together(
            program.options.workers,
            lambda rank: _work(program, Worker(program.options, rank, Path(folder), board)),
            ranks=program.options.ranks,
        )


def _work(program: Program, worker: Worker) -> list[Record]:
    records: list[Record] = []
    parts = len(worker.optimizers)
    for action in program.actions:
        record, worker.seen, worker.served = Record(), [], None
        records.append(record)
        try:
            action.do(worker)
            shown = [part for part in range(parts) if action.shows(part, parts)]
            record.states = {part: worker.state(part) for part in shown}
        except Exception as failure:
            record.raised, record.message = type(failure).__name__, str(failure)
        record.values, record.seen, record.served = worker.values(), worker.seen, worker.served
        if record.raised not in GOES_ON:
            worker.board.all_saved.abort()
            break
    return records


def check(program: Program) -> int:
    """Raise AssertionError, with the program, unless the library did as the model; else actions that ran."""
    try:
        of_ranks = run(program)
        actions = _compare(program, of_ranks)
        if len(program.code()) % 8 == 0:  # some of them twice
            _same(of_ranks, run(program), actions)
    except Exception as failure:
        raise AssertionError(f"{type(failure).__name__}: {failure}\n\n{program.code()}") from failure
    return actions


def _compare(program: Program, of_ranks: list[list[Record]]) -> int:
    reference = Reference(program.options)
    for number, action in enumerate(program.actions):
        where = f"action {number}, {action!r}"
        records = [rank[number] if number < len(rank) else None for rank in of_ranks]
        if not all(records):
            gone = [rank for rank, record in enumerate(records) if record is None]
            raise AssertionError(f"before {where}: only ranks {gone} had ended: {_raised(of_ranks, number)}")
        there: list[Record] = [record for record in records if record is not None]
        reference.happened = [record.raised for record in there]
        reference.seen = [[] for _ in there]
        reference.showed = [record.values for record in there]
        reference.served = [record.served for record in there]
        allowed: Sequence[tuple[str, ...]] = [()] * len(there)
        over = False
        try:
            action.say(reference)
        except Refused as refused:
            allowed, over = refused.ranks, isinstance(refused, Over)
        for rank, (record, names) in enumerate(zip(there, allowed, strict=True)):
            if record.raised not in (names or ("",)):
                raise AssertionError(
                    f"{where}: rank {rank} raised {record.raised or 'nothing'} ({record.message}), "
                    f"and {' or '.join(names) or 'nothing'} was right"
                )
        if over:
            for record in there:
                record.values = {}
            return number + 1
        _compare_ranks(where, reference, there)
        if any(record.raised not in GOES_ON for record in there):
            return number + 1
    largest = max((step for part in reference.parts for step in part.checks), default=0.0)
    assert largest < CLOSE, f"the model itself loses {largest}"
    return len(program.actions)


def _raised(of_ranks: list[list[Record]], number: int) -> str:
    return "; ".join(
        f"rank {rank} {records[-1].raised}: {records[-1].message}"
        for rank, records in enumerate(of_ranks)
        if len(records) <= number
    )


def _compare_ranks(where: str, reference: Reference, records: list[Record]) -> None:
    for rank, record in enumerate(records):
        still = set(NAMES) - reference.moving(rank)  # of the others nobody knows how far they are
        record.values = {name: record.values[name] for name in NAMES if name in still}
        possible = [
            _difference(record.values, {name: values[name] for name in still})
            for values in reference.possible(rank)
        ]
        best = min(possible)
        if not best[0] < CLOSE:
            modes = [seat.mode for seat in reference.seats(rank)]
            raise AssertionError(f"{where}: rank {rank}'s {best[1]} is {best[0]:.3g} off, in mode {modes}")
        if len(record.seen) != len(reference.seen[rank]):
            raise AssertionError(
                f"{where}: rank {rank} looked {len(record.seen)} times, not {len(reference.seen[rank])}"
            )
        for seen, right in zip(record.seen, reference.seen[rank], strict=True):
            if not reference.options.hooked:
                right = {name: right[name] for name in still}
            off, name = _difference(seen, right)
            if not off < CLOSE:
                raise AssertionError(f"{where}: rank {rank} saw {name} {off:.3g} off where it looked")
    for part in range(len(reference.parts)):
        if all(part in record.states for record in records):
            _compare_states(where, reference, part, [record.states[part] for record in records])


def _compare_states(where: str, reference: Reference, number: int, states: list[dict[str, Any]]) -> None:
    part, options = reference.parts[number], reference.options
    if options.averages_gradients:
        return
    if not part.seats[0].taken:
        if any("x" in state for state in states):
            raise AssertionError(f"{where}: x is there before it was taken")
        return
    server = _server_errors(part.seats[0].x, states)
    loaded = any(seat.source == "loaded" for seat in part.seats)
    of_all = {name: part.collected(name) for name in part.seats[0].x if loaded}
    known = {name: s for name, s in of_all.items() if s is not None}
    served = options.double and not (loaded and not all(seat.under.double for seat in part.seats))
    for rank, (seat, state) in enumerate(zip(part.seats, states, strict=True)):
        if (state["rounds"], state["local_steps_done"]) != (seat.t, seat.h):
            raise AssertionError(
                f"{where}: rank {rank} is in round {state['rounds']}, local step "
                f"{state['local_steps_done']}, not {seat.t}, {seat.h}"
            )
        for what, ours, right in (
            ("x", state["x"], seat.x),
            ("e", state["errors"], seat.e),
            ("s", server, seat.s | known),
        ):
            if what == "s" and not served:
                continue
            off, name = _difference({n: np.asarray(v) for n, v in ours.items()}, right)
            if not off < CLOSE:
                raise AssertionError(f"{where}: rank {rank}'s {what} of {name} is {off:.3g} off")
    if any(seat.source != "kept" for seat in part.seats):
        return
    for name in part.seats[0].x:
        if len({state["x"][name].numpy().tobytes() for state in states}) > 1:
            raise AssertionError(f"{where}: x of {name} has other bits on other ranks")


def _server_errors(x: Vec, states: list[dict[str, Any]]) -> Vec:
    """s, from the pieces that the ranks have."""
    whole = {name: np.full(value.size, np.nan) for name, value in x.items()}
    for state in states:
        for name, piece in state.get("server_errors", {}).items():
            values = piece["values"].numpy()
            whole[name][piece["start"] : piece["start"] + values.size] = values
    return {name: values.reshape(x[name].shape) for name, values in whole.items()}


def _difference(ours: Vec, right: Vec) -> tuple[float, str]:
    """The largest, relative to 1 or the number, and whose it is."""
    if set(right) - set(ours):
        return np.inf, f"{sorted(set(right) ^ set(ours))}"
    worst = (0.0, "")
    for name, value in right.items():
        off = _off(ours[name], value)
        if not off <= worst[0]:
            worst = (off, name)
    return worst


def _off(ours: Array, right: Array) -> float:
    if ours.shape != right.shape:
        return np.inf
    off = float(np.max(np.abs(ours - right) / np.maximum(1.0, np.abs(right)), initial=0.0))
    return np.inf if np.isnan(off) else off


def _same(one: list[list[Record]], other: list[list[Record]], actions: int) -> None:
    """Two runs of one program give the same bits, in the actions that the model has an account of."""
    for rank, (mine, again) in enumerate(zip(one, other, strict=True)):
        for number, (first, second) in enumerate(zip(mine[:actions], again[:actions], strict=True)):
            same = first.raised == second.raised and all(
                first.values[name].tobytes() == second.values[name].tobytes() for name in first.values
            )
            if not same:
                raise AssertionError(f"action {number}: rank {rank} does not do the same twice")
