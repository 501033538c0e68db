"""Commands are killed at random moments; the next one must find everything, and leave nothing over.

``python -m tests.campaign.kills FOLDER SEED COMMAND=NUM ...`` prints ``{command: [tried, bad]}``.
It is a process of its own: commands run in forks of it, and an engine that was opened before a fork
does not work after it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engineworks import cli
from engineworks.runtime.bundle import read
from engineworks.runtime.errors import EngineworksError

_MAKE = """
import sys; from pathlib import Path; import numpy as np
from engineworks.runtime import images, testing
root = Path(sys.argv[1])
testing.write_tiny_noising_bundle(root / "int8", int8=True)
testing.write_tiny_noising_bundle(root / "float", int8=False)
testing.write_flowers(root / "flowers", size=(32, 32), num_train=4, num_test=2)
rng = np.random.default_rng(0)
for i in range(12):
    images.write(root / f"pictures/{i:02}.png", rng.integers(0, 255, (64, 64, 3), np.uint8))
"""
_TRAIN = [
    *("backbone.weights=none", "backbone.name=test_resnet", "preprocess.size=[32, 32]"),
    *("train.epochs=2", "train.batch_size=8", "train.checkpoint_steps=1", "train.device=cpu"),
]
_BUNDLES = ("out", "bundle")


@dataclass(frozen=True)
class Command:
    """What is killed.

    Attributes:
        arguments: of the command line, in a place; they may depend on what is there.
        prepare: makes a place.
        result: what of a place must be as without a kill, once the next command has ended.
    """

    arguments: Callable[[Path], list[object]]
    prepare: Callable[[Path], object]
    result: Callable[[Path], object]


def commands(made: Path) -> dict[str, Command]:
    """The commands by name; ``made`` holds what they read."""
    pictures, whole = made / "pictures", made / "int8"

    def with_bundle(place: Path) -> None:
        shutil.copytree(whole, place / "bundle")

    def train(place: Path) -> list[object]:
        run = ["train", "paco", "--data", made / "flowers", "--out", place / "run"]
        if (place / "run" / "run.json").exists():
            return [*run, "--resume"]
        return [*run, *(word for setting in _TRAIN for word in ("--set", setting))]

    def infer(place: Path) -> list[object]:
        return [
            *("infer", whole, "--source", pictures, "--out", place / "out", "--exist-ok"),
            *("--backend", "ort", "--save-overlays", "--jsonl", "--batch", 2),
        ]

    def export(place: Path) -> list[object]:
        return [
            *("export", made / "float", "--out", place / "out", "--exist-ok", "--int8"),
            *("--samples", pictures, "--num-samples", 2, "--method", "minmax", "--threads", 1),
            *("--seconds", 0.1),
        ]

    def bank(place: Path) -> list[object]:
        bundle = place / "bundle"
        return ["bank", "add", whole, "--images", pictures, "--out", bundle, "--exist-ok"]

    return {
        "train": Command(train, Path.exists, _weights),
        "infer": Command(infer, Path.exists, lambda place: _bytes(place / "out", "results.*")),
        "export": Command(export, Path.exists, lambda place: read(place / "out").manifest.graphs),
        "bank": Command(bank, with_bundle, lambda place: read(place / "bundle").manifest.files),
        "set-threshold": Command(
            lambda place: ["bundle", "set-threshold", place / "bundle", "image", 5],
            with_bundle,
            lambda place: read(place / "bundle").manifest.digest,
        ),
    }


def _weights(place: Path) -> object:
    info = json.loads((place / "run" / "run.json").read_text())
    return info["results"], info["step"], _bytes(place / "run", "weights/*", "metrics.csv")


def _bytes(folder: Path, *patterns: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for each in patterns for path in folder.glob(each)}


def start(arguments: list[object], log: Path) -> int:
    """Begin a command in a fork; its process."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = cli.main(["-q", *map(str, arguments)], standalone_mode=False) or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(code)
    return pid


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kills(command: Command, folder: Path, num: int, rng: random.Random) -> Iterator[str | None]:
    """Kill a command ``num`` times; each time what is bad, or None."""
    log, place = folder / "log", folder / "place"
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder / "tmp")

    def fresh() -> None:
        for each in (place, folder / "tmp"):
            shutil.rmtree(each, ignore_errors=True)
            each.mkdir(parents=True)
        command.prepare(place)

    fresh()
    begin = time.monotonic()
    assert finish(start(command.arguments(place), log)) == 0, log.read_text()
    seconds = time.monotonic() - begin
    want = command.result(place)
    for _ in range(num):
        fresh()
        pid = start(command.arguments(place), log)
        time.sleep(rng.uniform(0, seconds))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        finish(pid)
        yield _judge(command, place, log, want)


def _judge(command: Command, place: Path, log: Path, want: object) -> str | None:
    for name in _BUNDLES:
        path = place / name
        if (path / "manifest.json").exists() or (
            name == "bundle" and command.prepare != Path.exists
        ):
            try:
                read(path)
            except EngineworksError as error:
                return f"a bundle is refused after the kill: {error}"
    if code := finish(start(command.arguments(place), log)):
        return f"the next command fails with {code}: {log.read_text()[-300:]}"
    if command.result(place) != want:
        return "the result differs from that without a kill"
    hidden = [
        path.name for folder in (place, place.with_name("tmp")) for path in folder.rglob(".*")
    ]
    return f"left over after the next command: {hidden}" if hidden else None


def main() -> None:
    folder, seed, *chosen = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    made = folder / "made"
    if not made.exists():
        subprocess.run([sys.executable, "-c", _MAKE, made], check=True)
    # what commands import, once
    import onnxruntime

    import engineworks.export.pipeline
    import engineworks.runtime.systems.noising.extend
    import engineworks.training.systems.paco.task
    import engineworks.training.train

    assert onnxruntime, engineworks
    known, counts = commands(made), {}
    for each in chosen:
        name, num = each.split("=")
        found = list(kills(known[name], folder, int(num), random.Random(seed)))
        counts[name] = [len(found), [bad for bad in found if bad]]
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main()
