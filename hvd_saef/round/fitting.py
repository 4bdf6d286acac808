"""Whether a saved state fits an optimizer, looked at before anything changes. Local."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvd_saef.memory.layout import Layout
from hvd_saef.memory.state import State, check_shapes, misfit
from hvd_saef.settings import Settings

AS_SAVED = (
    "wrap with the settings that it was saved with; or take 'hvd_saef' out of the state dict, and x from the "
    "model's"
)
VERSION = 2


def check_state(saved: Mapping[str, Any], kept: Layout, settings: Settings, workers: int) -> None:
    """Raise ValueError, naming what is wrong, if `saved` is not a state for these parameters and settings."""
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
    if bool(saved.get("x", kept.slots)) != bool(kept.slots):
        which = "it was saved" if kept.slots else "this optimizer is wrapped"
        raise misfit(
            f"{which} with feedback='none' and a dense compressor, where gradients are averaged and no x "
            f"or errors are kept; {AS_SAVED}"
        )
    for name, _, _ in kept.frozen:
        if name in saved.get("x", ()):
            raise misfit(f"{name!r} was trained, and is frozen here: set requires_grad before loading")
    State.check(saved, kept)
    before = saved.get("settings", {}).get("feedback")
    if settings.feedback == "none" and before != "none" and _has_errors(saved):
        raise misfit(f"it holds compression errors, which feedback='none' would drop; {AS_SAVED}")
    if saved["reached"] is not None:
        check_shapes("the training point", saved["reached"], kept)
    if saved["workers"] != workers and kept.buckets and not saved["consolidated"]:
        raise misfit(
            f"it was saved by {saved['workers']} workers and is loaded by {workers}, which drops errors; "
            "call optimizer.consolidate() before saving, or load it on as many workers"
        )


def _has_errors(saved: Mapping[str, Any]) -> bool:
    """Whether any error in a state is not zero."""
    served = (piece["values"] for piece in saved["server_errors"].values())
    return any(bool(error.any()) for errors in (saved["errors"].values(), served) for error in errors)
