"""Programs of everything that users do, by all ranks together, against a model in plain numpy.

`make machine` runs others for an hour. What fails is printed as Python, to be put in here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from hvd_saef.kernels import native  # noqa: F401  # built or not, before threads ask
from tests.machine.actions import Backward, Forward, Look, Step, Zero
from tests.machine.options import Options
from tests.machine.programs import programs
from tests.machine.running import Program, check

FIXED = settings(
    max_examples=int(os.environ.get("HVD_SAEF_MACHINE_PROGRAMS", "150")),
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)
ITERATION = (Zero(), Forward(), Backward(), Step())


@FIXED
@given(programs())
def test_programs_do_as_the_model(program: Program) -> None:
    check(program)
