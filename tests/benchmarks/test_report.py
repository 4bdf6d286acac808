"""The quick start's report says what the rows say."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import Row, curves, gap, mean, report, summary, table

METHODS = {"SGDM": 1.0, "EF-SignSGDM-DC": 1.5, "SAEF-SignSGDM-DC": 0.9}


def rows() -> list[Row]:
    """Three methods, two seeds, two epochs, SAEF behind full precision after the second."""
    return [
        Row(seed, method, epoch, loss / epoch + 0.1 * seed + late, 0.5, 1e6 * epoch, 3e7 * epoch, 1.0)
        for method, loss in METHODS.items()
        for seed in (0, 1)
        for epoch in (1, 2)
        for late in [0.5 if (method, epoch) == ("SAEF-SignSGDM-DC", 2) else 0.0]
    ]


def test_summary() -> None:
    text = "\n".join(summary(curves(rows()), cut=2))
    assert "SAEF-SignSGDM-DC is ahead of EF after 1 of 2 epochs" in text
    assert "or better, to within two standard errors, after 1 of 2 epochs before the rate cut" in text
    assert "SAEF-SignSGDM-DC ends at a loss of 1.0000, full precision at 0.5500" in text
    assert "EF-SignSGDM-DC            sends 1/30.0" in text
    assert "lowest loss first, after epoch 1: SAEF-SignSGDM-DC, SGDM, EF-SignSGDM-DC" in text


def test_means_and_gaps() -> None:
    assert mean([1.0, 3.0]) == (2.0, 1.0)
    assert mean([2.0]) == (2.0, 0.0)
    assert -1.5 < gap(curves(rows()), "SAEF-SignSGDM-DC", 1) < -1.4
    assert gap(curves(rows()), "SAEF-SignSGDM-DC", 2) > 2


def test_files_and_table(tmp_path: Path) -> None:
    report(rows(), tmp_path, cut=2)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 1 + len(rows())
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert table(curves(rows())) in (tmp_path / "summary.txt").read_text()
