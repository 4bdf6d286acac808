"""Makes the part "hvd_saef" of a state dict, and checks if a saved one fits. Local."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvd_saef.memory.layout import Layout
from hvd_saef.memory.state import State, check_shapes, misfit
from hvd_saef.round.loaded import Loaded
from hvd_saef.round.modes import Modes
from hvd_saef.settings import Settings
from hvd_saef.transport.communicator import Communicator

AS_SAVED = (
    "wrap with the settings that it was saved with; or take 'hvd_saef' out of the state dict, and x from the "
    "model's"
)
VERSION = 2


def check_state(saved: Mapping[str, Any], with_state: Layout, settings: Settings, workers: int) -> None:
    """Raises ValueError if `saved` does not fit these parameters and settings; the message says why."""
    if saved.get("version") != VERSION:
        raise ValueError(
            f"the state under 'hvd_saef' is of version {saved.get('version')!r}: {VERSION} is allowed."
        )
    for key in ("rank", "workers", "consolidated", "local_steps_done", "reached"):
        if key not in saved:
            raise misfit(f"it has no {key!r}")
    if saved["reached"] is None and saved["local_steps_done"] != 0:
        raise misfit("it has local steps without the point they reached")
    if not State.is_in(saved):
        return
    if bool(saved.get("x", with_state.slots)) != bool(with_state.slots):
        which = "it was saved" if with_state.slots else "this optimizer is wrapped"
        raise misfit(
            f"{which} with feedback='none' and a dense compressor, where gradients are averaged and no x "
            f"or errors are kept; {AS_SAVED}"
        )
    for name, _, _ in with_state.frozen:
        if name in saved.get("x", ()):
            raise misfit(f"{name!r} was trained, and is frozen here: set requires_grad before loading")
    State.check(saved, with_state)
    before = saved.get("settings", {}).get("feedback")
    if settings.feedback == "none" and before != "none" and _has_errors(saved):
        raise misfit(f"it holds compression errors, which feedback='none' would drop; {AS_SAVED}")
    if saved["reached"] is not None:
        check_shapes("the training point", saved["reached"], with_state)
    if saved["workers"] != workers and with_state.buckets and not saved["consolidated"]:
        raise misfit(
            f"it was saved by {saved['workers']} workers and is loaded by {workers}, which drops errors; "
            "call optimizer.consolidate() before saving, or load it on as many workers"
        )


def _has_errors(saved: Mapping[str, Any]) -> bool:
    """Returns True if any element of e or s in a saved state is not zero."""
    served = (piece["values"] for piece in saved["server_errors"].values())
    return any(bool(error.any()) for errors in (saved["errors"].values(), served) for error in errors)


def export_state(
    communicator: Communicator,
    settings: Settings,
    modes: Modes,
    loaded: Loaded,
    server_errors: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns plain numbers and copies of tensors: all that training needs to continue.

    `loaded` is a loaded state that workers have not agreed on yet; `server_errors` is all of s after
    consolidate(), else None.
    """
    exported: dict[str, Any] = {
        "version": VERSION,
        "rank": communicator.worker if loaded.saver is None else loaded.saver,
        "workers": communicator.workers,
        "count": communicator.counts[communicator.worker],
        "consolidated": server_errors is not None,
        "local_steps_done": modes.progress.local_steps_done,
        "reached": None,
    }
    # A loaded state that is not agreed on yet is passed on with its own settings, under which b is elsewhere.
    point = modes.training_point() if loaded.saver is None else loaded.with_writes(modes).training_point
    if modes.state and point is not None:
        names = [slot.name for slot in modes.state.layout.slots]
        exported["reached"] = dict(zip(names, point, strict=True))
    if modes.state:
        exported |= modes.state.export()
    if server_errors is not None:
        exported["server_errors"] = server_errors
    elif loaded.saver is not None:  # not agreed on yet: the loaded s is passed on unchanged
        exported["server_errors"] = loaded.server_errors
    exported["settings"] = loaded.settings or {
        "feedback": settings.feedback,
        "alpha": settings.alpha,
        "beta": settings.beta,
        "double_compression": settings.double_compression,
    }
    return exported
