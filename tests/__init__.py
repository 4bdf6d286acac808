"""Tests. With HVD_SAEF_WITHOUT=NAME a process and all that it starts lack a protection: tests/without.py."""

import os

if os.environ.get("HVD_SAEF_WITHOUT"):
    from tests import without

    without.switch_off(os.environ["HVD_SAEF_WITHOUT"])

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks at this when torch imports it; see tests.gpu
