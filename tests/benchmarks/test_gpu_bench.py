"""What `make bench-gpu` measures on a GPU, run here on the CPU, tiny: that it runs, and what it computes."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import kernels as timed
from benchmarks.gpu import machine, models, peer, steps, wire
from benchmarks.gpu.__main__ import COMMAND, TITLES, table
from benchmarks.gpu.pieces import Place, Row
from benchmarks.models import SHAPES
from hvd_saef import Compression, kernels
from hvd_saef.compression import Blocks
from hvd_saef.planning import codec, plan
from hvd_saef.planning.constants import Constants, of_gpus
from tests.gpu.registry import without_triton

HERE = Place(torch.device("cpu"), tiny=True)


def test_resnet_50_is_that_of_the_other_benchmarks() -> None:
    with torch.device("meta"):
        resnet, gpt = models.ResNet(), models.GPT()
    assert [tuple(parameter.shape) for parameter in resnet.parameters()] == SHAPES["resnet50"]()
    assert sum(parameter.numel() for parameter in gpt.parameters()) == 124_439_808  # GPT-2 small


@pytest.mark.parametrize("version", ["", "triton"])
def test_kernels(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if version and without_triton(HERE):
        pytest.skip(without_triton(HERE))
    monkeypatch.setattr(timed, "sizes_of", lambda layout, place: [40, 3])
    monkeypatch.setattr(timed, "turns", lambda *_, **__: 1)
    with kernels.only(version):
        rows = list(timed.work(HERE))
        assert len(list(timed.counted(HERE))) == (
            2 if kernels.version_for(HERE.device, torch.float32).FUSES else 0
        )
    names = [row["name"] for row in rows if row["layout"] == "tiny, float32"]
    if kernels.load(version or "compiled") and len(names) > 1:
        assert [name for name in names if name.startswith("sign DC")][:4] == [
            "sign DC send",
            "sign DC serve",
            "sign DC receive",
            "sign DC send, twin",
        ]
    assert ("tiny, bfloat16" in {row["layout"] for row in rows if "send" in row["name"]}) is bool(version)
    assert all(row["ms"] > 0 for row in rows if "ms" in row)


def test_the_peer_gives_back_signs_and_keeps_the_rest() -> None:
    """The chain does the job: the buffer and the error together are what they were."""
    chain = peer.OneBit(100, 4, torch.device("cpu"))
    before, server = chain.buffer.clone(), chain.server_error.clone()
    scale = chain.send()
    signs = chain.bits.float() * 2 - 1
    torch.testing.assert_close(scale * signs + chain.error, before)
    assert torch.equal(chain.unpack(chain.pack(chain.bits)), chain.bits)
    answer = chain.serve()
    mean = signs.view(4, -1).mean(0) + server
    torch.testing.assert_close(
        answer * torch.sign(mean + 0.0).where(mean != 0, 1.0) + chain.server_error, mean
    )
    names = [row["name"] for row in timed.peer(HERE)]
    assert names[0] == "1-bit chain send"
    assert len(names) == 5


def test_steps_of_one_worker() -> None:
    rows = list(steps.alone(HERE))
    assert [(row["model"], row["method"]) for row in rows] == [
        (task.name, method) for task in models.tasks(HERE) for method in steps.methods()
    ]
    assert all(row["workers"] == 1 for row in rows)
    assert len(wire.predictions([{"piece": "alone", **row} for row in rows])) == 2 * 3 * len(wire.WORKERS)


def test_steps_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each of several processes runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", port),
    ):
        monkeypatch.setenv(name, value)
    steps.main(str(tmp_path / "rows"), "cpu", "tiny")
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["method"] for row in rows] == 2 * list(steps.methods())


def measured() -> list[Row]:
    """Rows of one model as a GPU might give them: round numbers."""
    step = {"model": "m", "workers": 1, "elements": 1_000_000, "backward ms": 4.0, "payload": 125_000}
    return [
        {"piece": "machine", "gpu": "a GPU"},
        {"piece": "codec", "constants": {"sign_encode": 2e-9, "land": 1e-9}},
        {"piece": "copies", "name": "", "bytes": 1000, "seconds": 4e-6},
        {"piece": "alone", "method": "no exchange", "ms": 10.0, "added ms": 0.0, **step},
        {"piece": "alone", "method": "DDP", "ms": 11.0, "added ms": 1.0, **step},
        {"piece": "alone", "method": "sign DC", "ms": 12.0, "added ms": 20.0, **step},
    ]


def test_the_break_even_bandwidth() -> None:
    """At it, both predictions agree; below it ours is faster, above it DDP is."""
    first = wire.predictions(measured())[0]
    sent = 2 * 7 / 8 * (4e6 - 125e3)
    ours = 12e-3 + 2 * 125e3 * 4e-9
    assert math.isclose(first["break-even"], 8 * sent / (ours - 11e-3) / 1e9)
    assert math.isclose(first["break-even, DDP hidden"], 8 * sent / (ours - 11e-3 + 4e-3) / 1e9)
    assert first["ours at 1"] < first["DDP at 1"]
    assert first["ours at 400"] > first["DDP at 400"]
    faster = [row | {"ms": 5.0} if row.get("method") == "sign DC" else row for row in measured()]
    assert wire.predictions(faster)[0]["break-even"] == math.inf
    assert wire.summary(faster)[0]["break-even"] is None
    assert "break-even" in table(measured())


def test_constants_for_plan(tmp_path: Path) -> None:
    """What was measured replaces estimates, and is no longer called one."""
    assert "plan-constants.json" in wire.save(measured(), tmp_path)
    constants = Constants.load(tmp_path / "plan-constants.json")
    assert (constants.seconds["sign_encode"], constants.seconds["land"]) == (2e-9, 1e-9)
    assert math.isclose(constants.seconds["byte"], 4e-9)
    assert constants.seconds["message"] == of_gpus().seconds["message"]
    assert not {"sign_encode", "land", "byte"} & set(constants.estimated)
    assert {"message", "topk_encode", "hidden"} <= set(constants.estimated)
    assert constants.device.startswith("a GPU")
    assert wire.save([], tmp_path).startswith("No constants")


def test_constants_are_those_of_calibrate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "Settings", SimpleNamespace(bucket_bytes=4 * plan.TENSOR))
    (row,) = wire.codec(HERE)
    assert set(row["constants"]) == {"land", "sign_encode", "sign_decode", "topk_encode", "topk_decode"}


def test_every_piece_has_its_place_in_the_table() -> None:
    assert ["machine", *TITLES] == [piece.name for piece in COMMAND.pieces]
    assert sum(piece.seconds for piece in COMMAND.pieces[1:]) < 8 * 70
    (row,) = machine.look(HERE)
    assert row["torch"] == torch.__version__
    assert row["C++"].startswith(("C++", "built", "not built"))
    (copied, *_) = steps.copies(HERE)
    lines: Any = table([{"piece": "copies", **copied}])
    assert "host and back" in lines
    assert Compression.sign.payload_bytes(Blocks.cut([8], None, torch.float32)) == 5
