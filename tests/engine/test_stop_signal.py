"""Signals that stop a training after its step, or soon."""

import os
import queue
import signal
import threading
import time

import pytest

from dmjd.engine import stop_signal
from dmjd.engine.stop_signal import StopNow, StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_repeated_signal_is_one_request_and_a_later_one_ends_the_process(monkeypatch, number):
    """A closed terminal sends SIGHUP twice."""
    seen = []
    before = signal.signal(number, lambda *_: seen.append(number))
    try:
        with StopSignal() as stop:
            for _ in range(2):
                os.kill(os.getpid(), number)
            assert stop.requested == number
            assert not seen
            monkeypatch.setattr(stop_signal, "SAME_REQUEST", 0.0)
            os.kill(os.getpid(), number)
            assert seen == [number]
        assert signal.getsignal(number) not in (signal.SIG_DFL, signal.default_int_handler)
    finally:
        signal.signal(number, before)


def test_a_request_is_heard_at_once_and_in_a_thread_of_its_own():
    """What the signal interrupts may hold the lock of the stream that the message goes to."""
    lock, heard = threading.Lock(), queue.SimpleQueue()

    def say(number: int) -> None:
        with lock:
            heard.put((number, threading.current_thread() is threading.main_thread()))

    with StopSignal(heard=say):
        with lock:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        assert heard.get(timeout=10) == (signal.SIGINT, False)
        time.sleep(0.05)
        assert heard.empty()


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_waits_for_a_while_and_then_interrupts():
    with StopSignal(patience=0.2) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with stop.interruptible():
            pass  # there is still time
        reader, _ = os.pipe()
        started = time.monotonic()
        with pytest.raises(StopNow), stop.interruptible():
            os.read(reader, 1)
        assert time.monotonic() - started < 5
        with pytest.raises(StopNow), stop.interruptible():  # from now on at once
            raise AssertionError("not reached")
