from __future__ import annotations

import os
import signal
import threading

import pytest

from engineworks.runtime.signals import Stopped, stoppable, unbroken


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def test_the_first_signal_raises_and_later_ones_are_passed_over() -> None:
    with stoppable():
        with pytest.raises(Stopped) as caught:
            send(signal.SIGHUP)
        send()
        send(signal.SIGHUP)

    assert caught.value.exit_code == 129


def test_ctrl_c_breaks_off_even_the_work_of_ending() -> None:
    with stoppable():
        with pytest.raises(Stopped):
            send()
        with pytest.raises(Stopped):
            send(signal.SIGINT)


def test_it_waits_for_what_must_not_be_broken_off() -> None:
    done = []
    with stoppable(), pytest.raises(Stopped) as caught, unbroken():
        with unbroken():
            send()
            done.append(1)
        done.append(2)

    assert done == [1, 2]
    assert caught.value.number == signal.SIGTERM


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_child_ends_at_once() -> None:
    with stoppable():
        pid = os.fork()
        if pid == 0:
            try:
                send()
            finally:
                os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_another_thread_may_run_a_command_too() -> None:
    done = []

    def run() -> None:
        with stoppable():
            done.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    assert done == [True]
