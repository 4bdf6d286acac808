"""Makes values loadable by `torch.load(weights_only=True)`, or names the value that cannot be loaded. Local.

NumPy's numbers become Python's.
"""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvd_saef.errors import CheckpointError

Leaf = Callable[[Any, str], Any]
"""Called as leaf(value, place) for a value that is no container; returns what replaces the value."""


def python_numbers(value: Any) -> Any:
    """Returns `value` with NumPy's numbers as Python's, also in dicts (and their keys), lists and tuples."""
    return _rebuilt(value, "", lambda one, place: _python(one))


def as_loadable(value: Any, place: str) -> Any:
    """Returns `value` in the form of :func:`python_numbers`, if `torch.load(weights_only=True)` takes it.

    Raises CheckpointError for the first part that cannot be loaded, named by its place: `place['key'][0]`.
    """
    try:
        return _rebuilt(value, place, _loadable)
    except RecursionError as error:
        raise CheckpointError(f"{place} contains itself, or is nested too deeply") from error


def _rebuilt(value: Any, place: str, leaf: Leaf) -> Any:
    """Returns `value` with its leaves replaced, or `value` itself if no leaf changes."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        items = [
            (_rebuilt(key, f"the key {key!r} of {place}", leaf), _rebuilt(one, f"{place}[{key!r}]", leaf))
            for key, one in value.items()
        ]
        if all(a is b and c is d for (a, c), (b, d) in zip(items, value.items(), strict=True)):
            return value
        rebuilt = kind(items)
        if kind is OrderedDict:  # a module's state dict has its parts' versions as attributes
            vars(rebuilt).update(vars(value))
        return rebuilt
    if kind in (list, tuple):
        parts = [_rebuilt(one, f"{place}[{i}]", leaf) for i, one in enumerate(value)]
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else kind(parts)
    return leaf(value, place)


def _python(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _loadable(value: Any, place: str) -> Any:
    value = _python(value)
    if type(value) in (bool, int, float, str, bytes, type(None)) or _is_plain(value):
        return value
    try:
        file = io.BytesIO()
        torch.save(value, file)
        for device in ("cpu", "meta"):  # as a checkpoint is loaded, and as it is checked
            file.seek(0)
            torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(
            f"{place} is a {kind.removeprefix('builtins.')}, which would not load again: files are loaded "
            "without running code (weights_only=True). Numbers, strings, tensors, None, and lists, tuples "
            f"and dicts of them are allowed: save {_instead(value)}"
        ) from error
    return value


def _is_plain(value: Any) -> bool:
    """Returns True if `value` is a tensor of a kind that always loads. Other values are tried."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type != "meta"
        and not value.is_quantized
    )


def _instead(value: Any) -> str:
    """Returns in words what the user can save instead of `value`."""
    if isinstance(value, np.ndarray):
        return "torch.from_numpy(array), or array.tolist()"
    if isinstance(value, os.PathLike):
        return "str(path)"
    if hasattr(value, "state_dict"):
        return "its state_dict()"
    return "what it holds in these"
