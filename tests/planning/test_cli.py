"""`hvd-saef plan` reads what users write, and prints what the model says."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from hvd_saef.cli import bandwidth, count, duration, main
from hvd_saef.planning.constants import FEATURES, Constants
from hvd_saef.planning.plan import METHODS

ROOT = Path(__file__).resolve().parents[2]
SLOW = ["--parameters", "25.6M", "--workers", "64", "--bandwidth", "100Mbit", "--compute", "0.12"]


def ask(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    main(["plan", *arguments])
    return capsys.readouterr().out


@pytest.fixture
def cheap(tmp_path: Path) -> str:
    """Constants of a machine on which the wire is all that costs."""
    path = tmp_path / "cheap.json"
    Constants({name: float(name == "wire") for name in FEATURES}, "a test").save(path)
    return str(path)


def test_a_slow_wire_pays(capsys: pytest.CaptureFixture[str], cheap: str) -> None:
    text = ask([*SLOW, "--constants", cheap], capsys)
    assert "MODEL" in text
    assert "Where from: a test." in text
    for method in METHODS:
        assert f"\n{method.name} " in text
    assert "hvd_saef.DistributedOptimizer(compression=hvd_saef.Compression." in text
    # 2·(63/64)·102.4 MB at 100 Mbit/s and 0.12 s
    assert "16.2480 s" in text


def test_a_fast_wire_does_not(capsys: pytest.CaptureFixture[str], cheap: str) -> None:
    fast = [argument.replace("100Mbit", "100Tbit") for argument in SLOW]
    text = ask([*fast, "--constants", cheap], capsys)
    assert "Advice: do not compress" in text
    assert re.search(r"Above \S+ Gbit/s no compressed method gains 5 %", text)
    assert "Advice: do not compress" not in ask([*SLOW, "--constants", cheap], capsys)


def test_ranks_of_a_node(capsys: pytest.CaptureFixture[str], cheap: str) -> None:
    text = ask([*SLOW, "--ranks-per-node", "8", "--inside", "200Gbit", "--constants", cheap], capsys)
    assert "64 ranks, 8 a node, whose nodes send 0.1 Gbit/s (each rank 200 inside)" in text
    assert "\nsign DC, node " in text
    assert 'worker="node")' in text
    assert ", node" not in ask([*SLOW, "--constants", cheap], capsys)
    with pytest.raises(SystemExit):
        ask([*SLOW, "--ranks-per-node", "7"], capsys)
    assert "a divisor of --workers 64" in capsys.readouterr().err


def test_the_packages_own_constants(capsys: pytest.CaptureFixture[str]) -> None:
    text = ask([*SLOW, "--device", "cpu"], capsys)
    assert Constants.load().source in text
    assert Constants.load().device in text
    assert "ESTIMATED, not measured: message, collective, latency, mean." in text
    assert "`hvd-saef calibrate`, started as your job is, measures your own" in text


def test_constants_are_of_the_device_that_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, cpu = (ask([*SLOW, "--device", device], capsys) for device in ("gpu", "cpu"))
    assert "ESTIMATED, not measured: all of them." in gpu
    assert gpu != cpu
    for there, expected in ((True, gpu), (False, cpu)):
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert ask(SLOW, capsys) == expected


PAGES = [ROOT / "README.md", ROOT / "docs" / "planning.md"]
COMMANDS = [
    command for page in PAGES for command in re.findall(r"(?m)^hvd-saef (plan .*)$", page.read_text())
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_pages(command: str, capsys: pytest.CaptureFixture[str], cheap: str) -> None:
    mine = dataclasses.replace(Constants.load(Path(cheap)), bandwidth=1e10)  # as calibrated
    mine.save(Path(cheap))
    main([cheap if word == "mine.json" else word for word in shlex.split(command)])
    assert "Advice: " in capsys.readouterr().out


def test_the_advice_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    """With one GPU a rank, 64 workers are told to compress at 10 Gbit/s."""
    main(shlex.split(COMMANDS[0]))
    text = capsys.readouterr().out
    assert "ESTIMATED" in text
    assert "Advice: sign DC" in text
    assert "With overlap=True as well: " in text
    assert "With local_steps=8 as well: " in text


def test_where_compression_stops_paying_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "free.json"
    Constants(dict.fromkeys(FEATURES, 0.0)).save(path)
    assert "gains 5 % on Horovod's float32 at any bandwidth" in ask([*SLOW, "--constants", str(path)], capsys)
    assert "float32 even at 1 Tbit/s (sign DC)" in ask([*SLOW, "--device", "cpu"], capsys)


def test_many_buckets_are_worth_larger_ones(capsys: pytest.CaptureFixture[str]) -> None:
    large = ["--parameters", "7B", "--workers", "64", "--bandwidth", "100Gbit", "--compute", "1"]
    text = ask([*large, "--device", "gpu"], capsys)
    assert "With bucket_bytes=536870912 as well: " in text
    assert "bucket_bytes" not in ask([*SLOW, "--device", "gpu"], capsys)


def test_local_steps_and_overlap(capsys: pytest.CaptureFixture[str], cheap: str) -> None:
    text = ask([*SLOW, "--local-steps", "4", "--overlap", "--constants", cheap], capsys)
    assert "(this library's methods every 4 steps, with overlap)" in text
    assert "local_steps=4, overlap=True)" in text
    assert "as well" not in text
    # 0.12 s, and a quarter of the sign payloads' 2·(63/64)·25.6 MB / 8 at 100 Mbit/s
    (line,) = [line for line in text.splitlines() if line.startswith("sign DC  ")]
    assert "0.2460 s" in line
    assert "16.2480 s" in text  # Horovod's allreduce has neither


@pytest.mark.parametrize(
    ("text", "number"), [("25.6M", 25_600_000), ("7B", 7_000_000_000), ("64", 64), ("1.5k", 1500)]
)
def test_counts(text: str, number: int) -> None:
    assert count(text) == number


@pytest.mark.parametrize(
    ("text", "number"), [("10Gbit", 1e10), ("100 mbit/s", 1e8), ("2.5Gbit/s", 2.5e9), ("9bit", 9.0)]
)
def test_bandwidths(text: str, number: float) -> None:
    assert bandwidth(text) == number


@pytest.mark.parametrize(("read", "text"), [(count, "many"), (count, "0"), (count, "1.2.3M"), (count, "-5")])
def test_wrong_counts(read: object, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        count(text)


@pytest.mark.parametrize("text", ["10", "10GB", "0Gbit", "1..Gbit"])
def test_wrong_bandwidths(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="a rate is allowed"):
        bandwidth(text)


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="seconds"):
        duration(text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--workers", "none"], "'none': a number >= 1"),
        (["--constants", "/no/such/file"], "No such file"),
        (["--bandwith", "1Gbit"], "--bandwith"),
        (["--device", "abacus"], "invalid choice: 'abacus'"),
        (["--device", "gpu", "--constants", "HERE"], "not allowed with argument --device"),
        (["--constants", __file__], "test_cli.py: no constants of the model: "),
        (["--local-steps", "0"], "'0': a number >= 1"),
    ],
)
def test_mistakes_are_named(
    capsys: pytest.CaptureFixture[str], cheap: str, change: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", *SLOW, *(cheap if word == "HERE" else word for word in change)])
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_the_entry_point() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    assert 'hvd-saef = "hvd_saef.cli:main"' in declared
