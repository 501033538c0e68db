"""No traceback reaches a user: what the system refuses, what nobody foresaw, signals to end."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from engineworks import cli
from engineworks.runtime import doctor

ROOT = Path(__file__).parents[1]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(each) for each in arguments])


def raising(error: BaseException) -> Callable[[], None]:
    def examine() -> None:
        raise error

    return examine


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where logs of errors go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "out/x: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "out/x"), "out/x: Permission denied"),
        (
            MemoryError("Unable to allocate 112 GiB"),
            "not enough memory: Unable to allocate 112 GiB",
        ),
    ],
)
def test_what_the_system_refuses_has_its_reason_and_a_way_out(
    monkeypatch: pytest.MonkeyPatch, logs: Path, error: BaseException, reason: str
) -> None:
    monkeypatch.setattr(doctor, "examine", raising(error))

    done = invoke("doctor")

    assert done.exit_code == 1
    assert reason in done.output
    assert "fix: " in done.output
    assert list(logs.iterdir()) == []


def test_what_nobody_foresaw_is_one_line_and_a_log(
    monkeypatch: pytest.MonkeyPatch, logs: Path
) -> None:
    monkeypatch.setattr(doctor, "examine", raising(KeyError("verdict")))

    done = invoke("doctor")

    assert done.exit_code == 70
    (log,) = logs.iterdir()
    assert done.output.startswith(f"error: unexpected KeyError: 'verdict'; details: {log}\n")
    assert "report it" in done.output
    assert "Traceback" not in done.output
    assert "Traceback" in log.read_text()
    assert "in examine" in log.read_text()


def test_what_a_thread_dies_of_is_told_in_the_same_way(
    monkeypatch: pytest.MonkeyPatch, logs: Path
) -> None:
    def examine() -> dict[str, object]:
        for error in (OSError(errno.ENOSPC, "No space left on device"), KeyError("verdict")):
            thread = threading.Thread(target=raising(error))
            thread.start()
            thread.join()
        return {}

    monkeypatch.setattr(doctor, "examine", examine)
    before = threading.excepthook

    done = invoke("doctor")

    (log,) = logs.iterdir()
    assert "error: No space left on device\n  fix: make room on the disk" in done.output
    assert f"error: unexpected KeyError: 'verdict'; details: {log}\n" in done.output
    assert "Traceback" not in done.output
    assert threading.excepthook is before


def test_without_a_place_for_a_log_the_line_of_the_fault_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    monkeypatch.setattr(doctor, "examine", raising(KeyError("x")))

    done = invoke("doctor")

    assert done.exit_code == 70
    assert "test_cli_errors.py, line " in done.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_command_with_its_number(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    closed = []

    def examine() -> list[object]:
        try:
            os.kill(os.getpid(), number)
            return []
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # the second one breaks nothing off
            closed.append(True)

    before = signal.getsignal(number)
    monkeypatch.setattr(doctor, "examine", examine)

    done = invoke("doctor")

    assert done.exit_code == 128 + number
    assert f"stopped by {number.name}" in done.output
    assert closed == [True]
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300, "/proc/none"])
def test_an_output_that_is_no_place_is_explained(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()

    done = invoke("sample", "noising", "--out", tmp_path / place)

    assert done.exit_code == 1
    assert "error: " in done.output
    assert "fix: " in done.output


def test_an_output_that_is_full_ends_without_a_traceback() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "cli.py", "doctor"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
