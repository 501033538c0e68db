"""The command line as a user has it: a process of its own, and what it answered."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_S = 600  # of one command; none takes a tenth of it on an idle machine
# others' packages that commands load; to import them takes up to nine seconds of a core
_LIBRARIES = (
    *("numpy", "scipy.stats", "sklearn.metrics", "cv2", "av", "faiss", "pydantic", "rich", "yaml"),
    *("onnx", "onnxruntime", "openvino", "onnxscript", "onnxslim", "torch", "torchvision", "timm"),
    *("accelerate", "safetensors", "torch.utils.tensorboard", "torch._inductor.compile_fx"),
)


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def all(self) -> str:
        return self.out + self.err


def cli(*arguments: object) -> Answer:
    """``python cli.py ARGUMENTS``."""
    return python(ROOT / "cli.py", *arguments)


def interpreter(*arguments: object, cwd: Path | None = None) -> Answer:
    """``python ARGUMENTS``."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def python(*arguments: object, cwd: Path = ROOT) -> Answer:
    """``python FILE ARGUMENTS`` or ``python -c CODE``, without the time that imports take.

    The process is forked from one that has imported others' packages and nothing of this project,
    which it finds beside FILE, or in this tree. What is wrong with the order of such imports does
    not show here: README's commands and the tests of loading start the interpreter itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in _LIBRARIES if find_spec(name.split(".")[0])])
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = context.Process(target=_begin, args=([*map(str, arguments)], cwd, out, err))
        process.start()
        process.join(LIMIT_S)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"{arguments} took more than {LIMIT_S} s")
        assert process.exitcode is not None
        return Answer(process.exitcode, out.read_text("utf-8"), err.read_text("utf-8"))


def _begin(arguments: Sequence[str], cwd: Path, out: Path, err: Path) -> None:
    """What the interpreter does with its arguments; output goes to files."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    script, *rest = arguments
    if script == "-c":
        sys.path.insert(0, str(ROOT))
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        path = (cwd / script).resolve()
        sys.path.insert(0, str(path.parent))
        sys.argv = [script, *rest]
        runpy.run_path(str(path), run_name="__main__")


def refused(answer: Answer, code: int, *words: object) -> None:
    """One clear message on stderr, nothing on stdout, and the exit code."""
    assert answer.code == code, answer.all
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert answer.err.lower().count("error:") == 1
    for word in words:
        assert str(word) in answer.err
