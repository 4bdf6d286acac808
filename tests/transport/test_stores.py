"""Messages through stores and boxes: what ranks say and hear while one of them is stopped, or has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from hvd_saef.transport import boxes, stores
from hvd_saef.transport.boxes import BoxPost, open_boxes
from hvd_saef.transport.posts import Call, Message, Post
from hvd_saef.transport.stores import StorePost, client
from tests.mpi.launch import LIMIT

SERVER = """
import sys
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""
RANKS = 3


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """A process that serves a store, the job's."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", process.stdout.readline().strip())
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        yield process
        process.send_signal(signal.SIGCONT)
        process.kill()


def waits(rank: int, number: int) -> Message:
    return Message(rank, {"WORDS": Call(number, "a call")})


def until(happened: Callable[[], bool]) -> None:
    """Waits for what another thread or process does."""
    deadline = time.monotonic() + LIMIT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def hears(post: Post, wanted: Message) -> None:
    """Waits until the post hears this, whatever else."""
    until(lambda: wanted in list(post.hear()))


def is_lost(post: Post) -> bool:
    list(post.hear())
    return post.lost != ""


def test_a_store_whose_process_is_stopped(server: subprocess.Popen[str]) -> None:
    """Asking it hangs, so another thread does that; rank 0 is named; what was said meanwhile arrives."""
    first, second = (StorePost("test", rank, RANKS, limit=1.0) for rank in (1, 2))
    first.tell(waits(1, 1), [0, 2])
    hears(second, waits(1, 1))
    server.send_signal(signal.SIGSTOP)
    first.tell(waits(1, 2), [0, 2])
    until(lambda: is_lost(first))
    where = f"rank 0 at 127.0.0.1:{os.environ['MASTER_PORT']}, which serves it, is stopped"
    assert where in first.lost
    server.send_signal(signal.SIGCONT)
    hears(second, waits(1, 2))
    until(lambda: not is_lost(first))


def test_a_store_that_is_gone(server: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "LONGEST", 1.0)
    post = StorePost("test", 1, RANKS)
    server.kill()
    server.wait()
    until(lambda: is_lost(post))
    assert "rank 0 at" in post.lost
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert "torchrun on" in post.lost
    until(post._is_idle)  # a thread within torch must not outlive Python


def test_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    post = StorePost("test", 0, RANKS)
    post.tell(waits(0, 1), [1])
    until(lambda: is_lost(post))
    assert post.lost == "MASTER_ADDR and MASTER_PORT are not set, so nobody knows who is there."


def in_boxes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[BoxPost | None, str]]:
    """The posts of all ranks, each with a box of its own, though they are threads here."""
    own, kept = threading.local(), []
    meeting = threading.Barrier(RANKS)
    table: list[list[Any]] = [RANKS * [None] for _ in range(2)]

    def serve() -> Any:
        if not hasattr(own, "store"):
            own.store = dist.TCPStore(  # type: ignore[attr-defined]
                "127.0.0.1", 0, is_master=True, wait_for_workers=False
            )
            kept.append(own.store)  # longer than its thread
        return own.store

    monkeypatch.setattr(boxes, "_server", serve)

    def open_one(rank: int) -> tuple[BoxPost | None, str]:
        calls = iter(table)

        def gather(value: Any) -> Any:
            everyone = next(calls)
            everyone[rank] = value
            meeting.wait(LIMIT)
            return everyone

        return open_boxes("test", rank, RANKS, gather)

    with ThreadPoolExecutor(RANKS) as threads:
        return list(threads.map(open_one, range(RANKS)))


def test_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "gloo_address", lambda: "127.0.0.1")
    opened = [post for post, _ in in_boxes(monkeypatch)]
    first, second, third = [post for post in opened if post is not None]
    first.tell(waits(0, 1), [1, 2])
    third.tell(waits(2, 1), [1])
    hears(second, waits(0, 1))
    hears(third, waits(0, 1))
    assert list(third.hear()) == []  # nothing new
    assert list(first.hear()) == []  # it was told nothing
    first.tell(Message(0, {"UP": Call(4, "payloads")}), [1, 2])
    both = {"WORDS": Call(1, "a call"), "UP": Call(4, "payloads")}
    hears(second, Message(0, both))
    first.tell(Message(0, {}, {"WORDS": 2}), [1, 2])
    hears(third, Message(0, both, {"WORDS": 2}))
    assert first.lost == second.lost == ""


def test_a_box_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then all use the job's store, and whoever met with it can say why."""
    monkeypatch.setattr(boxes, "gloo_address", lambda: "no-such-host.invalid")
    monkeypatch.setattr(boxes, "LONGEST", 1.0)
    for rank, (post, reason) in enumerate(in_boxes(monkeypatch)):
        assert post is None
        assert f"the box of rank {int(rank == 0)} at no-such-host.invalid:" in reason
        assert "cannot be reached" in reason


def test_a_rank_that_is_stopped_or_has_ended_costs_nothing(server: subprocess.Popen[str]) -> None:
    """Whoever tells it something waits for no answer."""
    with ThreadPoolExecutor(1) as thread:
        port = int(os.environ["MASTER_PORT"])
        post = BoxPost(1, None, {0: client(("127.0.0.1", port), 30.0, "test")})
        server.send_signal(signal.SIGSTOP)

        def tell_often() -> None:
            for number in range(1000):
                post.tell(waits(1, number), [0])

        thread.submit(tell_often).result(LIMIT)
        assert 0 in post._boxes
        server.kill()
        server.wait()

        def tell_until_noticed() -> None:
            while 0 in post._boxes:
                post.tell(waits(1, 1), [0])

        thread.submit(tell_until_noticed).result(LIMIT)
