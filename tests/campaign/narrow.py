"""Commands where there is no room, or no right to write; to be run in a mount namespace of its own.

``python -m tests.campaign.narrow FOLDER SIZE ...`` tries disks of these sizes; without one, a root
that is read-only but for FOLDER/place. It prints ``[[what, bad or null], ...]``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from engineworks import cli
from engineworks.runtime import images, testing
from engineworks.runtime.bundle import read
from engineworks.runtime.errors import EngineworksError

Try = tuple[str, str | None]


def make(made: Path) -> None:
    testing.write_tiny_noising_bundle(made / "noising")
    testing.write_tiny_refdet_bundle(made / "refdet")
    rng = np.random.default_rng(0)
    for i in range(12):
        images.write(made / f"pictures/{i:02}.png", rng.integers(0, 255, (64, 64, 3), np.uint8))
    subprocess.run(
        [sys.executable, "cli.py", "sample", "noising", "--out", made / "data"], check=True
    )


def arguments(made: Path, place: Path) -> dict[str, list[object]]:
    """Commands that write into ``place``."""
    noising, pictures, out = made / "noising", made / "pictures", place / "out"
    infer = ["infer", noising, "--backend", "ort", "--threads", 1, "--out"]
    video = made / "data" / "video.mp4"
    int8 = ["--int8", "--samples", pictures, "--num-samples", 2, "--method", "minmax"]
    int8 += ["--seconds", 0.1]
    settings = ["backbone.weights=none", "backbone.name=test_resnet", "backbone.stages=[1]"]
    small = [word for each in (*settings, "preprocess.size=[64, 64]") for word in ("--set", each)]
    report = [made.parent / "o", "--exist-ok", "--report", place / "r.html"]
    tries = {
        "infer": [*infer, out, "--source", pictures, "--jsonl", "--save-overlays", "--batch", 2],
        "infer, video": [*infer, out, "--source", video, "--save-overlays"],
        "report": [*infer, *report, "--source", pictures],
        "export": ["export", noising, "--out", out, *int8, "--threads", 1],
        "bank add": ["bank", "add", noising, "--images", pictures, "--out", out],
        "refs": ["refs", made / "refdet", "--refs", pictures, "--out", place / "x.npz"],
        "sample": ["sample", "paco", "--out", out],
        "train": ["train", "noising", "--data", made / "data", "--out", out, *small],
        "eval": ["eval", noising, "--data", made / "data", "--json", place / "x.json"],
    }
    if "CAMPAIGN" not in os.environ:
        del tries["sample"], tries["train"]  # they take seconds
    return tries


def judged(what: str, words: list[object], place: Path, *, may_fail: bool = True) -> Try:
    done = CliRunner().invoke(cli.main, ["-q", *map(str, words)])
    text = done.output
    if done.exit_code not in ((0, 1) if may_fail else (0,)) or "Traceback" in text:
        return what, f"exit {done.exit_code}: {text[-300:]}"
    if done.exit_code == 1 and "fix:" not in text:
        return what, f"no way out: {text[-300:]}"
    out = place / "out"
    left = [path.name for path in place.rglob(".*")] if place.exists() else []
    if left:
        return what, f"left over: {left}"
    if words[0] in ("export", "bank") and out.exists():
        try:
            read(out)
        except EngineworksError as error:
            return what, f"half a bundle: {error}"
    for table in out.glob("*.csv"):
        if table.stat().st_size and not table.read_bytes().endswith(b"\n"):
            return what, f"half a line in {table.name}"
    return what, None


def mount(place: Path, size: str) -> None:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)


def full(made: Path, place: Path, sizes: list[str]) -> Iterator[Try]:
    for size in sizes:
        for what, words in arguments(made, place).items():
            mount(place, size)
            yield judged(f"{what}, disk of {size}", words, place)
            # PyAV leaves a video open whose very header found no room
            subprocess.run(["umount", "--lazy", place], check=True)


def read_only_root(made: Path, place: Path) -> Iterator[Try]:
    """Nothing can be written but what is in ``place``: no temporary folder either."""
    commands = arguments(made, place)
    for what in ("infer", "infer, video", "eval", "export"):
        yield judged(f"{what}, read-only root", commands[what], place, may_fail=False)
        shutil.rmtree(place / "out", ignore_errors=True)
    nowhere = made.parent / "nowhere"
    for what, words in arguments(made, nowhere).items():
        yield judged(f"{what}, read-only target", words, nowhere)


def main() -> None:
    folder, *sizes = Path(sys.argv[1]), *sys.argv[2:]
    made, place = folder / "made", folder / "place"
    if sizes:
        make(made)
        found = list(full(made, place, sizes))
    else:  # whoever started this mounted ``place``, and all else read-only
        found = list(read_only_root(made, place))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
