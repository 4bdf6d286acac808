"""The settings of the algorithm, in a validated and frozen object that is hashed, compared and saved."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

Feedback = Literal["saef", "ef", "none"]
Server = Literal["auto", "replicated", "sharded"]
OnNonfinite = Literal["raise", "skip"]
Weights = Literal["equal", "ranks"]

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Settings:
    """The settings of one :func:`hvd_saef.DistributedOptimizer`, whose docstring describes them.

    Raises TypeError or ValueError for a wrong setting; the message names it, its value and what is allowed.
    """

    feedback: Feedback = "saef"
    step_ahead: float = 1.0
    server_step_ahead: float = 0.0
    double_compression: bool = True
    averaging_period: int | None = None
    averaging_spread: bool = False
    averaging_fp16: bool = False
    local_steps: int = 1
    warmup_steps: int = 0
    block_size: int | None = None
    server: Server = "auto"
    bucket_bytes: int = 32 * MEBIBYTE
    overlap: bool = False
    on_nonfinite: OnNonfinite = "raise"
    check_consensus_every: int = 0
    worker: Literal["rank", "node"] | tuple[tuple[int, ...], ...] = "rank"
    weights: Weights = "equal"
    sparse_as_dense: bool = False

    def __post_init__(self) -> None:
        _choice("feedback", self.feedback, ("saef", "ef", "none"))
        _choice("server", self.server, ("auto", "replicated", "sharded"))
        _choice("on_nonfinite", self.on_nonfinite, ("raise", "skip"))
        _choice("weights", self.weights, ("equal", "ranks"))
        if not isinstance(self.worker, tuple):
            _choice("worker", self.worker, ("rank", "node"))
        _fraction("step_ahead", self.step_ahead)
        _fraction("server_step_ahead", self.server_step_ahead)
        _flag("double_compression", self.double_compression)
        _flag("overlap", self.overlap)
        _flag("averaging_spread", self.averaging_spread)
        _flag("averaging_fp16", self.averaging_fp16)
        _flag("sparse_as_dense", self.sparse_as_dense)
        _whole("averaging_period", self.averaging_period, 2, or_none=True)
        _whole("local_steps", self.local_steps, 1)
        _whole("warmup_steps", self.warmup_steps, 0)
        _whole("block_size", self.block_size, 1, or_none=True)
        _whole("bucket_bytes", self.bucket_bytes, 1)
        _whole("check_consensus_every", self.check_consensus_every, 0)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.feedback != "saef" and self.step_ahead != 1.0:
            raise ValueError(
                f"step_ahead={self.step_ahead!r} has no meaning with feedback={self.feedback!r}: only "
                'feedback="saef" steps ahead. Leave step_ahead at its default, or use feedback="saef".'
            )
        if self.server_step_ahead > 0:
            for name, value, allowed in (
                ("feedback", self.feedback, ("saef",)),
                ("double_compression", self.double_compression, (True,)),
                ("server", self.server, ("auto", "replicated")),
            ):
                if value not in allowed:
                    raise ValueError(
                        f"server_step_ahead={self.server_step_ahead!r} steps ahead by the server's error, "
                        f"which {name}={value!r} does not give to every worker; allowed with it: "
                        f"{name}={' or '.join(map(repr, allowed))}."
                    )
        if self.server == "sharded" and not self.double_compression:
            raise ValueError(
                "server='sharded' needs double_compression=True: with single-way compression there is "
                "nothing to recompress, and every worker needs every payload. "
                "Use server='auto' or 'replicated'."
            )
        if self.overlap and self.on_nonfinite == "skip":
            raise ValueError(
                "overlap=True takes local steps before all workers know that all gradients are finite, so it "
                "cannot skip such steps: use on_nonfinite='raise' with it, or overlap=False."
            )
        for name in ("averaging_spread", "averaging_fp16"):
            if getattr(self, name) and self.averaging_period is None:
                raise ValueError(
                    f"{name}=True has no meaning with averaging_period=None: set averaging_period, or leave "
                    f"{name} at False."
                )
        if self.averaging_period is not None and self.feedback == "none":
            raise ValueError(
                f"averaging_period={self.averaging_period!r} has no meaning with feedback='none', which "
                "keeps no errors to average. Leave averaging_period at None."
            )

    @property
    def alpha(self) -> float:
        """The coefficient α of e in the step ahead; it is 0 unless the feedback is SAEF."""
        return float(self.step_ahead) if self.feedback == "saef" else 0.0

    @property
    def beta(self) -> float:
        """The coefficient β of s in the step ahead; it is 0 unless the feedback is SAEF."""
        return float(self.server_step_ahead) if self.feedback == "saef" else 0.0

    def sharded(self, workers: int) -> bool:
        """Returns True if the server is cut between the `workers` workers.

        This means less work for each worker and, from three workers on, fewer bytes.
        """
        if self.server == "auto":
            return self.double_compression and self.beta == 0 and workers > 1
        return self.server == "sharded"

    def describe(self) -> dict[str, Any]:
        """Returns all settings as plain values, for comparison between workers and for state dicts."""
        return dataclasses.asdict(self)


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(map(repr, allowed))}.")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: allowed are True and False.")


def _fraction(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: a number from 0 to 1 is allowed.")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: a number from 0 to 1 is allowed.")


def check_passes(passes: object) -> None:
    """Raises TypeError or ValueError unless `passes`, the backward passes before a step, is an int >= 1."""
    _whole("backward_passes_per_step", passes, 1)


def _whole(name: str, value: object, least: int, or_none: bool = False) -> None:
    if value is None and or_none:
        return
    allowed = f"a whole number >= {least}{' or None' if or_none else ''} is allowed"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: {allowed}.")
    if value < least:
        raise ValueError(f"{name}={value!r}: {allowed}.")
