"""Makes one state for all workers out of the states of K other workers, so that x̃ is kept. Local."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hvd_saef.memory import algorithm


def mean_state(states: Iterator[dict[str, Any]], workers: int) -> dict[str, Any]:
    """Returns one optimizer state dict, for each of `workers`, with the mean errors and moments of `states`.

    The server's error is put together from the stretches that the workers kept; it is zero where none is
    left. A worker of several ranks has the weight that it had in training. Local steps since the last round
    become a part of the errors. Sums run in the order of `states`, so every worker gets the same bits.
    `states` are read one at a time; their tensors are overwritten.
    """
    merged = _counted(next(states))
    ours = merged["hvd_saef"]
    served = {name: torch.zeros_like(x).flatten() for name, x in ours.get("x", {}).items()}
    _place(ours.get("server_errors", {}), served)
    count = ours.get("count", 1)
    for state in map(_counted, states):
        count += state["hvd_saef"].get("count", 1)
        for name, error in state["hvd_saef"].get("errors", {}).items():
            ours["errors"][name] += error
        _place(state["hvd_saef"].get("server_errors", {}), served)
        for index, moments in state["state"].items():
            if index not in merged["state"]:
                merged["state"][index] = moments  # the states before had no gradient yet, and add zero
                continue
            for key, value in moments.items():
                if _is_moment(key, value):
                    merged["state"][index][key] += value
    for error in ours.get("errors", {}).values():
        error /= count
    for moments in merged["state"].values():
        for key, value in moments.items():
            if _is_moment(key, value):
                value /= count
    if ours.get("server_errors"):
        ours["server_errors"] = {name: {"start": 0, "values": values} for name, values in served.items()}
    return _for_everyone(merged, workers)


def _counted(state: dict[str, Any]) -> dict[str, Any]:
    """Multiplies a worker's errors and moments by the worker's weight, in place; returns `state`."""
    _take_up_local_steps(state["hvd_saef"])
    count = state["hvd_saef"].get("count", 1)
    if count != 1:
        moments = [v for m in state["state"].values() for key, v in m.items() if _is_moment(key, v)]
        for summand in (*state["hvd_saef"].get("errors", {}).values(), *moments):
            summand *= count
    return state


def _take_up_local_steps(ours: dict[str, Any]) -> None:
    """Adds the movement of the local steps since the last round, b - y, to the errors in place."""
    points: dict[str, Tensor] = ours.get("reached") or {}
    if points and "settings" not in ours:  # files of 0.1.0 do not say where the steps began
        warnings.warn("local steps since the last round are dropped: the files are of 0.1.0", stacklevel=2)
        return
    for name, y in points.items():
        settings: dict[str, float] = ours["settings"]
        x, e = ours["x"][name], ours["errors"][name]
        s = torch.zeros_like(x)
        if settings["beta"]:  # the replicated server's whole s is here, in the order of x's memory
            s.as_strided((x.numel(),), (1,)).copy_(ours["server_errors"][name]["values"])
        b = algorithm.step_ahead(x, e, s, settings["alpha"], settings["beta"])
        algorithm.add_update(e, b.to(y.dtype).to(b.dtype), y)


def without_errors(state: dict[str, Any], workers: int) -> dict[str, Any]:
    """Returns one optimizer state dict, for each of `workers`, that keeps only x and the groups."""
    ours = state["hvd_saef"]
    for error in ours.get("errors", {}).values():
        error.zero_()
    if ours.get("server_errors"):
        values = {name: torch.zeros_like(x).flatten() for name, x in ours["x"].items()}
        ours["server_errors"] = {name: {"start": 0, "values": zeros} for name, zeros in values.items()}
    return _for_everyone(state | {"state": {}}, workers)


def _for_everyone(state: dict[str, Any], workers: int) -> dict[str, Any]:
    ours = {"workers": workers, "consolidated": True, "local_steps_done": 0, "reached": None}
    return state | {"hvd_saef": state["hvd_saef"] | ours}


def _is_moment(key: str, value: Any) -> bool:
    return key != "step" and isinstance(value, Tensor) and value.is_floating_point()


def _place(pieces: dict[str, Any], whole: dict[str, Tensor]) -> None:
    for name, piece in pieces.items():
        whole[name][piece["start"] : piece["start"] + piece["values"].numel()] = piece["values"]
