"""What the torch at hand does not have yet: tests that need it are skipped, with a reason that names it."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def has(name: str) -> bool:
    """Whether torch has a name, as "optim.Muon"."""
    found: object = torch
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None


def needs(*names: str) -> pytest.MarkDecorator:
    """The mark of a test that needs these names of torch's."""
    missing = [f"torch.{name}" for name in names if not has(name)]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def needs_optimizer(name: str, fused: bool = False) -> pytest.MarkDecorator:
    """The mark of a test that needs this class of torch.optim, or its fused implementation for the CPU."""
    if fused and has(f"optim.{name}"):
        reason = f"needs torch.optim.{name}(fused=True) on the CPU"
        return pytest.mark.skipif(not _has_fused(name), reason=reason)
    return needs(f"optim.{name}")


def _has_fused(name: str) -> bool:
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    try:
        getattr(torch.optim, name)([parameter], lr=0.1, fused=True).step()
    except (RuntimeError, TypeError):
        return False
    return True
