"""The command line as a user has it: a process of its own, and what it answered."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


LIMIT_S = 120  # of one command; none takes a fifth of it on an idle machine


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def all(self) -> str:
        return self.out + self.err


def cli(*arguments: object) -> Answer:
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def refused(answer: Answer, code: int, *words: object) -> None:
    """One clear message on stderr, nothing on stdout, and the exit code."""
    assert answer.code == code, answer.all
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert answer.err.lower().count("error:") == 1
    for word in words:
        assert str(word) in answer.err
