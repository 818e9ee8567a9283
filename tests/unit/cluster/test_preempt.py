"""What signals do to a command, wherever it is when they come."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import preempt
from cluster.preempt import (
    STOP,
    Interrupted,
    SignalRelay,
    check_signals,
    end_if_asked,
    handling_signals,
    telling,
)
from tests.conftest import REPOSITORY

TIMEOUT_S = 60


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def said() -> Iterator[list[str]]:
    lines: list[str] = []
    with handling_signals(lines.append):
        yield lines


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_the_command_and_says_what_is_done(
    said: list[str], number: signal.Signals, code: int
) -> None:
    with pytest.raises(Interrupted) as caught, telling(lambda: "finished: prune"):
        send(number)
    assert caught.value.exit_code == code
    assert str(caught.value) == f"interrupted ({number.name}); finished: prune"
    assert isinstance(caught.value, KeyboardInterrupt), "libraries let these pass"


def test_the_inner_word_is_the_one_that_counts(said: list[str]) -> None:
    with (
        pytest.raises(Interrupted, match="shards"),
        telling(lambda: "a"),
        telling(lambda: "shards"),
    ):
        send(signal.SIGTERM)
    assert "the same command again" in str(Interrupted(signal.SIGTERM))


def test_usr1_ends_nothing(said: list[str]) -> None:
    send(signal.SIGUSR1)
    deadline_s = time.monotonic() + TIMEOUT_S
    while not said and time.monotonic() < deadline_s:
        time.sleep(0.001)
    assert len(said) == 1
    assert said[0].startswith("SIGUSR1: only a recovery has a checkpoint to make")


def test_the_second_one_ends_the_process_at_once() -> None:
    code = """
import os, signal
from cluster.preempt import handling_signals
with handling_signals(print):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
        print("still cleaning up")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, timeout=TIMEOUT_S
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_one_that_a_library_swallowed_is_raised_again(said: list[str]) -> None:
    with contextlib.suppress(BaseException):  # as an extension module does while it is imported
        send(signal.SIGTERM)
    with pytest.raises(Interrupted):
        check_signals()


def test_handlers_that_ray_replaced_are_set_again(said: list[str]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    check_signals()
    with pytest.raises(Interrupted):
        send(signal.SIGTERM)


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a command started with `&`
    try:
        with handling_signals(print):
            send(signal.SIGINT)
            check_signals()
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_those_from_before_in_the_end() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with handling_signals(print):
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_stop_after_the_last_step_ends_the_command_when_the_stage_is_done(
    said: list[str], tmp_path: Path
) -> None:
    with SignalRelay(tmp_path):
        send(signal.SIGTERM)
        check_signals()
    assert not (tmp_path / STOP).exists()
    with pytest.raises(Interrupted):
        end_if_asked()


class InterruptedTerminal(io.RawIOBase):
    """A terminal; a signal comes while it takes its first line."""

    def __init__(self) -> None:
        self.written = b""
        self.is_answered = threading.Event()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if not self.written:
            send(signal.SIGUSR1)
            time.sleep(0.01)
        self.written += bytes(data)
        if b"SIGUSR1" in self.written:
            self.is_answered.set()
        return len(data)


@pytest.mark.parametrize("kind", ["recovery", "command"])
def test_a_signal_in_the_middle_of_a_line_breaks_nothing(tmp_path: Path, kind: str) -> None:
    """A handler that wrote on the same thread would enter the stream a second time, and raise."""
    terminal = InterruptedTerminal()
    stream = io.BufferedWriter(terminal)

    def say(text: str) -> None:
        stream.write(text.encode() + b"\n")
        stream.flush()

    with SignalRelay(tmp_path, say) if kind == "recovery" else handling_signals(say):
        say("progress")
        assert terminal.is_answered.wait(TIMEOUT_S)
    assert terminal.written.startswith(b"progress\nSIGUSR1: ")


def test_a_second_stop_of_a_recovery_ends_the_command(said: list[str], tmp_path: Path) -> None:
    with SignalRelay(tmp_path):
        send(signal.SIGTERM)
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)


def test_an_abandoned_ray_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(preempt.os, "_exit", ended.append)
    monkeypatch.setattr(preempt._Process, "is_abandoned", False)
    with pytest.raises(SystemExit, match="75"):
        preempt.end_process(75)
    preempt.abandon()
    with pytest.raises(SystemExit):  # the process would be gone
        preempt.end_process(75)
    assert ended == [75]
