"""Processes that hang are ended with their stacks on record; signals reach a loop on a thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from cluster.preempt import SAVE, STOP, DrainWatch, Request, SignalRelay, StopRequests
from cluster.watchdog import EXIT_HANG, Watchdog

REPOSITORY = Path(__file__).resolve().parents[3]
TIMEOUT_S = 60  # of a child that should end by itself within two seconds


def start(code: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


HEAD = """
import ctypes, sys, threading, time
from pathlib import Path
from cluster.watchdog import Watchdog
folder = Path(sys.argv[1])
def say(text): (folder / "said").write_text(text)
def stuck_in_a_collective(): time.sleep(1000)
"""


def test_hang_ends_the_process_with_all_stacks(tmp_path: Path) -> None:
    """The loop runs on a thread, as under Ray, and another thread's stack is there as well."""
    child = start(
        HEAD + """
def idle_helper(): time.sleep(1000)
threading.Thread(target=idle_helper, daemon=True).start()
def loop():
    with Watchdog(folder / "stacks", floor_s=0.3, on_hang=say) as watchdog:
        for _ in range(5):
            time.sleep(0.01)
            watchdog.beat()
        stuck_in_a_collective()
thread = threading.Thread(target=loop)
thread.start()
thread.join()
""",
        tmp_path,
    )  # fmt: skip
    _, errors = child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == EXIT_HANG
    stacks = (tmp_path / "stacks").read_text()
    for text in (stacks, errors):
        assert "stuck_in_a_collective" in text
        assert "idle_helper" in text
        assert "no step for" in text
        assert "median step 0.0" in text
    said = (tmp_path / "said").read_text()
    assert said.endswith(f"stacks in {tmp_path / 'stacks'}")


def test_stuck_report_does_not_keep_a_hung_process(tmp_path: Path) -> None:
    child = start(
        HEAD.replace("say(text):", "say(text): time.sleep(1000);") + """
import cluster.watchdog as module
module._ON_HANG_TIMEOUT_S = 0.2
with Watchdog(folder / "stacks", floor_s=0.3, start_limit_s=0.3, on_hang=say):
    stuck_in_a_collective()
""",
        tmp_path,
    )  # fmt: skip
    child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == EXIT_HANG


def test_disk_that_hangs_does_not_keep_a_hung_process(tmp_path: Path) -> None:
    """The stacks would go to that disk too: here a full pipe, whose writer waits for ever."""
    child = start(
        HEAD + """
import os
import cluster.watchdog as module
module._ON_HANG_TIMEOUT_S = 0.2
_, end = os.pipe()
os.set_blocking(end, False)
while True:
    try: os.write(end, bytes(4096))
    except BlockingIOError: break
os.set_blocking(end, True)
path = Path(f"/proc/self/fd/{end}")
with Watchdog(path, floor_s=0.3, start_limit_s=1000, on_hang=say) as watchdog:
    with watchdog.allowing(0.3):
        stuck_in_a_collective()
""",
        tmp_path,
    )  # fmt: skip
    _, errors = child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == EXIT_HANG
    assert "stuck_in_a_collective" in errors
    assert "the limit is 0.3 s" in (tmp_path / "said").read_text()


def test_interpreter_that_is_stuck_itself_is_ended_too(tmp_path: Path) -> None:
    """PyDLL keeps the interpreter's lock, so no Python thread can run any more."""
    child = start(
        HEAD + """
with Watchdog(folder / "stacks", floor_s=0.2, start_limit_s=0.2, backstop_s=0.3):
    ctypes.PyDLL(None).sleep(1000)
""",
        tmp_path,
    )  # fmt: skip
    child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == 1
    assert "Timeout" in (tmp_path / "stacks").read_text()


def test_long_save_and_slow_start_are_no_hang(tmp_path: Path) -> None:
    child = start(
        HEAD + """
with Watchdog(folder / "stacks", floor_s=0.2, start_limit_s=1000, backstop_s=0.1) as watchdog:
    time.sleep(0.5)
    for _ in range(4):
        watchdog.beat()
    with watchdog.allowing(1000.0):
        time.sleep(0.6)
    watchdog.beat()
print("ended well")
time.sleep(0.5)
""",
        tmp_path,
    )  # fmt: skip
    output, errors = child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == 0, errors
    assert output == "ended well\n"
    assert (tmp_path / "stacks").read_text() == ""


def test_limit_is_a_multiple_of_the_median_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [0.0]
    monkeypatch.setattr("cluster.watchdog.time.monotonic", lambda: now_s[0])
    with Watchdog(tmp_path / "stacks", floor_s=20.0, start_limit_s=300.0) as watchdog:
        assert watchdog.limit_s == 300.0
        for step_s in (90.0, 3.0, 3.0, 3.0, 3.0):  # the first compiles
            now_s[0] += step_s
            watchdog.beat()
        assert watchdog.limit_s == 20.0
        for _ in range(20):
            now_s[0] += 10.0
            watchdog.beat()
        assert watchdog.limit_s == 50.0


def test_process_may_be_left_alive(tmp_path: Path) -> None:
    said, hung = [], threading.Event()

    def note(text: str) -> None:
        said.append(text)
        hung.set()

    with Watchdog(
        tmp_path / "stacks", floor_s=0.05, start_limit_s=0.05, on_hang=note, ends_process=False
    ):
        assert hung.wait(TIMEOUT_S)
    assert len(said) == 1


LOOP = """
import sys, threading, time
from pathlib import Path
from cluster.preempt import SignalRelay, StopRequests
folder = Path(sys.argv[1])
def loop():
    requests = StopRequests(folder, poll_s=0.0)
    for step in range(10**6):
        time.sleep(0.005)
        request = requests.poll()
        if request.should_save:
            requests.done(request)
            print("saved:", request.reason, flush=True)
        if request.should_stop:
            return
with SignalRelay(folder, lambda text: print("driver:", text, flush=True)):
    thread = threading.Thread(target=loop)
    print("ready", flush=True)
    STARTED
    thread.join()
print("stopped", flush=True)
"""


def read_until(child: subprocess.Popen, word: str) -> list[str]:
    assert child.stdout is not None
    lines = []
    killer = threading.Timer(TIMEOUT_S, child.kill)
    killer.start()
    try:
        for line in child.stdout:
            lines.append(line.strip())
            if word in line:
                return lines
    finally:
        killer.cancel()
    raise AssertionError(f"{word!r} never came: {lines} {child.communicate()}")


def test_signals_to_the_driver_reach_the_loop_on_its_thread(tmp_path: Path) -> None:
    (tmp_path / STOP).write_text("left by an earlier run")
    child = start(LOOP.replace("STARTED", "thread.start()"), tmp_path)
    read_until(child, "ready")
    child.send_signal(signal.SIGUSR1)
    assert read_until(child, "saved")[-1] == "saved: SIGUSR1 asked to save"
    (tmp_path / SAVE).touch()
    assert read_until(child, "saved")[-1] == "saved: a user asked to save"
    child.send_signal(signal.SIGTERM)
    assert read_until(child, "saved")[-1] == "saved: SIGTERM asked to stop"
    read_until(child, "stopped")  # what was read ahead with the last line is not told again
    _, errors = child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == 0, errors
    assert not any((tmp_path / switch).exists() for switch in (SAVE, STOP))


def test_second_sigterm_ends_a_driver_whose_loop_does_not_listen(tmp_path: Path) -> None:
    deaf = (
        "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start(); time.sleep(1000)"
    )
    child = start(LOOP.replace("STARTED", deaf), tmp_path)
    read_until(child, "ready")
    child.send_signal(signal.SIGTERM)
    read_until(child, "driver: SIGTERM")
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=TIMEOUT_S)
    assert child.returncode == -signal.SIGTERM


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with SignalRelay(tmp_path):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (tmp_path / SAVE).read_text() == "SIGUSR1"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_time_limit_leaves_room_for_the_step_and_the_save(tmp_path: Path) -> None:
    now_s = [1000.0]
    requests = StopRequests(tmp_path, deadline_s=2000.0, reserve_s=100.0, clock=lambda: now_s[0])
    assert requests.poll(next_step_s=30.0) == Request()
    now_s[0] = 1869.0
    assert requests.poll(next_step_s=30.0) == Request()
    now_s[0] = 1870.0
    assert requests.poll(next_step_s=30.0) == Request(
        True, True, "130 s are left of the time limit", is_time_limit=True
    )
    requests.reserve_s = 10.0  # saves turned out to be quick
    assert requests.poll(next_step_s=30.0) == Request()


def test_stop_comes_before_save_and_the_disk_is_not_asked_all_the_time(tmp_path: Path) -> None:
    now_s = [0.0]
    requests = StopRequests(tmp_path, poll_s=5.0, clock=lambda: now_s[0])
    assert requests.poll() == Request()
    (tmp_path / SAVE).touch()
    (tmp_path / STOP).write_text("an operator")
    now_s[0] = 4.0
    assert requests.poll() == Request()
    now_s[0] = 5.0
    request = requests.poll()
    assert request == Request(True, True, "an operator asked to stop")
    requests.done(request)
    assert list(tmp_path.iterdir()) == []


def test_a_drain_is_asked_for_now_and_then_and_news_once() -> None:
    now = [0.0]
    drains = DrainWatch(poll_s=60.0, clock=lambda: now[0])
    due = []
    for now[0] in (30.0, 59.0, 60.0, 61.0, 119.0, 130.0):
        due.append(drains.is_due())
    assert due == [False, False, True, False, False, True]
    answers = (False, True, True, False, True)
    assert [drains.is_news(answer) for answer in answers] == [False, True, False, False, True]
