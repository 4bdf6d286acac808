"""The speed benchmarks' tables say what was timed, and their models are what they claim to be."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from benchmarks.models import SHAPES, StandIn
from benchmarks.timings import BASELINE, LOCAL, Timing, plot, read, spread, summarize, table, write

NAN = math.nan


def timings() -> list[Timing]:
    """Three rounds of a machine that gets slower from one to the next."""
    return [
        Timing("tiny", "1gbit", 2, method, number, 4, seconds * slower, claimed, 3.2e6, 3e6, 8e6)
        for number, slower in enumerate((1.0, 2.0, 4.0))
        for method, seconds, claimed in ((LOCAL, 0.1, NAN), ("sign DC", 0.2, 3e6), (BASELINE, 1.0, NAN))
    ]


def test_ratios_are_taken_within_a_round() -> None:
    local, ours, baseline = summarize(timings())
    assert ours.seconds.median == pytest.approx(0.4)
    assert ours.ratio == pytest.approx((5.0, 5.0, 5.0))  # the same in each round, though times are not
    assert ours.added.median == pytest.approx(0.2)
    assert (baseline.ratio.median, local.added.median) == (1.0, 0.0)
    shuffled = [dataclasses.replace(t, round=2 - t.round) if t.method == BASELINE else t for t in timings()]
    assert summarize(shuffled)[1].ratio.low != pytest.approx(5.0)  # the check can fail


def test_a_method_alone_has_no_ratio() -> None:
    (alone,) = summarize([t for t in timings() if t.method == "sign DC"])
    assert math.isnan(alone.ratio.median)
    assert math.isnan(alone.added.median)


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0, NAN]) == (2.0, 3.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)
    assert math.isnan(spread([]).median)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "step.csv"
    write(timings(), path)
    again = read(path)
    assert list(map(repr, again)) == list(map(repr, timings()))  # NaN is not equal to NaN
    text = table(again, 1_000_000)
    assert "2 workers, links of 1gbit: medians of 3 rounds" in text
    assert "0.4000 (0.3000 to 0.6000)" in text
    plot([again, again], tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("model", "tensors", "elements"), [("resnet50", 161, 25_557_032), ("transformer", 148, 99_998_208)]
)
def test_shapes(model: str, tensors: int, elements: int) -> None:
    shapes = SHAPES[model]()
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes)) == elements


def test_the_stand_ins_gradients_come_one_by_one() -> None:
    shapes = SHAPES["tiny"]()
    constants = [torch.randn(shape) for shape in shapes]
    model = StandIn([torch.randn(shape) for shape in shapes], constants, rows=2)
    order: list[int] = []
    for number, parameter in enumerate(model.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda p, number=number: order.append(number))
    (3 * model()).backward()
    assert order == [3, 2, 1, 0]
    for parameter, constant in zip(model.parameters(), constants, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, 3 * constant)
