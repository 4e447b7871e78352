"""Being told to stop, and standing still: real signals to a real process."""

import signal
import subprocess
import sys
import time

import pytest

from blipds.signals import REQUEUE, StallWatch

WAITS = """
import sys, time
from blipds import signals
signals.ECHO_SECONDS = 0.5
with signals.StopSignals() as stop:
    print("ready", flush=True)
    while not stop.received:
        time.sleep(0.01)
    print(stop.received, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def waiting():
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_is_noted_and_a_second_ends_the_process(waiting, number):
    waiting.send_signal(number)
    assert waiting.stdout.readline() == f"{number.name}\n"
    waiting.send_signal(signal.SIGTERM)  # within moments: the same one, passed on by a launcher
    time.sleep(0.8)
    assert waiting.poll() is None
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(10) == 128 + signal.SIGTERM


def test_requeue_is_what_sysexits_calls_try_again_later():
    assert REQUEUE == 75


def test_a_stall_is_written_down(tmp_path):
    watch = StallWatch(tmp_path / "stacks" / "rank0.txt", minutes=0.2 / 60)
    watch.moved()
    deadline = time.monotonic() + 30
    while watch.path.stat().st_size == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    watch.close()
    assert "test_a_stall_is_written_down" in watch.path.read_text()


def test_a_run_that_moves_leaves_no_stacks(tmp_path):
    watch = StallWatch(tmp_path / "stacks" / "rank0.txt", minutes=1)
    watch.moved()
    watch.close()
    assert not (tmp_path / "stacks").exists()
