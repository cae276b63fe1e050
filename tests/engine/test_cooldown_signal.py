"""The signal that asks for a branch is noted, once, by the inner of two contexts."""

import signal
import threading

from dmjd.engine.cooldown_signal import SIGNAL, CooldownSignal


def test_the_signal_is_noted_until_it_is_taken():
    before = signal.getsignal(SIGNAL)
    with CooldownSignal() as outer:
        assert not outer.take()
        signal.raise_signal(SIGNAL)
        with CooldownSignal() as inner:
            signal.raise_signal(SIGNAL)
            signal.raise_signal(SIGNAL)
            assert inner.take()
            assert not inner.take()
        assert outer.take()
        assert not outer.take()
    assert signal.getsignal(SIGNAL) == before


def test_another_thread_than_the_main_one_changes_no_handler():
    before = signal.getsignal(SIGNAL)
    seen = []

    def work() -> None:
        with CooldownSignal():
            seen.append(signal.getsignal(SIGNAL))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before] == [signal.getsignal(SIGNAL)]
