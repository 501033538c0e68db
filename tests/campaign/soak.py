"""Long runs: whether memory or the number of open files grows.

``python -m tests.campaign.soak FOLDER BACKEND WHAT=NUM ...`` prints ``{WHAT: [[done, MiB of memory,
open files], ...]}``. Of ``pictures``, ``frames`` and ``cycles`` these are 20 moments of one run; of
an evaluation the peaks of two, over NUM and over four times as many pictures.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import numpy as np

from engineworks.runtime import images, pixels, spool, testing
from engineworks.runtime.bundle import read
from engineworks.runtime.infer import infer
from engineworks.runtime.sources import open_source
from engineworks.runtime.systems import SYSTEMS, System, open_system
from engineworks.runtime.video import VideoWriter

Mark = tuple[int, float, int]

_MARKS = 20
_SIZES = 500  # different pictures; each comes again and again
_OVER = 4  # times as many pictures
_LARGE = (320, 320)  # pictures that are judged at their own size


def resident() -> float:
    """Of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def peak() -> float:
    """Largest resident memory since ``forget_peak``, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def opened(bundle: Path, backend: str) -> System:
    return open_system(read(bundle), backend=backend, precision="int8", threads=1)


def bundle(folder: Path, name: str) -> Path:
    root = folder / f"bundle-{name}"
    if not root.exists():
        getattr(testing, f"write_tiny_{name}_bundle")(root, int8=True)
    return root


class Marks:
    """Moments of a run, evenly spread; a callback of ``infer``."""

    def __init__(self, num: int) -> None:
        self.found: list[Mark] = []
        self._num = num

    def __call__(self, done: int, _total: int) -> None:
        if done * _MARKS >= self._num * (len(self.found) + 1):
            self.found.append((done, resident(), open_files()))


def pictures(folder: Path, backend: str, num: int) -> list[Mark]:
    """Pictures of random sizes, in random order, by the system whose graph takes any size."""
    rng = np.random.default_rng(0)
    places = [folder / f"sizes/{i:03}.png" for i in range(min(_SIZES, num))]
    for path in places:
        if not path.exists():
            height, width = rng.integers(32, 200, 2)
            images.write(path, rng.integers(0, 255, (height, width, 3), np.uint8))
    chosen = np.resize(np.arange(len(places)), num)
    rng.shuffle(chosen)
    listed = folder / "pictures.txt"
    listed.write_text("".join(f"{places[i]}\n" for i in chosen))
    return inferred(folder, "stripe", backend, listed, num)


def frames(folder: Path, backend: str, num: int) -> list[Mark]:
    """A video with an annotated one, and the objects in it numbered."""
    path = folder / f"{num}.mp4"
    if not path.exists():
        rng = np.random.default_rng(0)
        drawn = [testing.draw_scene(rng, (64, 96), ("blue", "red"))[0] for _ in range(16)]
        with VideoWriter(path, Fraction(25)) as video:
            for i in range(num):
                video.write(drawn[i // 25 % 16], i / 25)
    return inferred(folder, "refdet", backend, path, num, overlays=True, track=True)


def inferred(
    folder: Path, name: str, backend: str, source: Path, num: int, **options: bool
) -> list[Mark]:
    marks, out = Marks(num), folder / "out"
    with closing(opened(bundle(folder, name), backend)) as system:
        given = open_source(str(source), system.reader)
        done = infer(system, given, out, batch=8, jsonl=True, progress=marks, **options)
    assert (done.num_done, done.num_failed) == (num, 0), done
    shutil.rmtree(out)
    return marks.found


def cycles(folder: Path, backend: str, num: int) -> list[Mark]:
    """Every system is opened, used and closed in turn."""
    marks, names, picture = Marks(num), list(SYSTEMS), np.full((64, 96, 3), 90, np.uint8)
    for i in range(num):
        with closing(opened(bundle(folder, names[i % len(names)]), backend)) as system:
            system.infer([picture])
        marks(i + 1, num)
    return marks.found


def evaluated(folder: Path, name: str, backend: str, num: int) -> list[Mark]:
    found: list[Mark] = []
    # what is kept in memory and sorted at once has a limit, which few pictures shall reach
    spool._IN_MEMORY, pixels._AT_ONCE = 1 << 20, 1 << 17
    with closing(opened(bundle(folder, name), backend)) as system:
        for count in (num, num, _OVER * num):  # the first one warms up
            data = labelled(folder / f"data-{name}-{count}", name, count)
            forget_peak()
            assert system.evaluate(data).num_pictures == count
            found.append((count, peak(), open_files()))
    return found[1:]


def labelled(root: Path, name: str, num: int) -> Path:
    """A labelled set with so many pictures to judge, an even number."""
    if root.exists():
        return root
    half = num // 2
    if name == "stripe":
        return testing.write_strips(
            root, size=_LARGE, num_train=1, num_good=half, num_defective=half
        )
    if name == "noising":
        return testing.write_parts(root, num_train=1, num_good=half, num_defective=half)
    if name == "refdet":
        return testing.write_scenes(root, names=("blue", "red"), num_train=1, num_test=num)
    testing.write_flowers(root, num_train=1, num_test=-(-num // 6))
    for path in sorted(root.glob("test/*/*.png"))[num:]:
        path.unlink()
    return root


def main() -> None:
    folder, backend, *chosen = Path(sys.argv[1]), sys.argv[2], *sys.argv[3:]
    runs = {"pictures": pictures, "frames": frames, "cycles": cycles}
    found = {}
    for each in chosen:
        what, num = each.split("=")
        if what in runs:
            found[what] = runs[what](folder, backend, int(num))
        else:
            found[what] = evaluated(folder, what, backend, int(num))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
