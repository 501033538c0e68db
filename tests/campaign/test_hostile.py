"""Hostile files: whatever their bytes say, an answer or an error raised on purpose, and no memory.

Everything is seeded. With ``CAMPAIGN=N`` there are N times as many tries as in the ordinary suite.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from engineworks.runtime import images, npy, planes, references, testing, video
from engineworks.runtime.bundle import MANIFEST_NAME, Bundle, read
from engineworks.runtime.errors import EngineworksError
from engineworks.runtime.graphs import check_graph
from engineworks.runtime.systems import SYSTEMS, open_system
from tests.campaign.conftest import Ledger

_SEED = 20
_MAX_BYTES = 1 << 30  # that Python may take for one try
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 7, 2**31, 2**63, 2**70, 1.5, 1e-300, 1e300, "", "x", "\x1b[31m", "../x",
    "batch", [], {}, [[]], [1], {"x": 1}, [-1, -1], [0, 0], [100_000, 100_000], "int64", ["a"],
    [None],
)  # fmt: skip


def attempt(ledger: Ledger, what: str, work: Callable[[], object]) -> None:
    """Note whether it ends in an answer or in an error raised on purpose, in little memory."""
    tracemalloc.start()
    try:
        work()
    except EngineworksError:
        bad = None
    except Exception as error:  # any other kind is what is looked for
        bad = f"{type(error).__name__}: {str(error)[:100]}"
    else:
        bad = None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    ledger.add(what, bad or (f"{peak >> 20} MiB" if peak > _MAX_BYTES else None))


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, more often in the head, and sometimes cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(data), 300) if rng.random() < 0.6 else len(data))
        changed[at] = rng.choice([0, 1, 127, 255, changed[at] ^ 1 << rng.randrange(8)])
    return bytes(changed[: rng.randrange(1, len(data))] if rng.random() < 0.1 else changed)


@pytest.fixture
def rng() -> random.Random:
    return random.Random(_SEED)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    return {name: getattr(testing, f"write_tiny_{name}_bundle")(root / name) for name in SYSTEMS}


def seal(root: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """As an attacker does: hashes and digest fit whatever lies in the folder."""
    path = root / MANIFEST_NAME
    content = json.loads(path.read_text())
    for name in content["files"]:
        data = (root / name).read_bytes()
        content["files"][name] = {"sha256": sha256(data).hexdigest(), "size_bytes": len(data)}
    change(content)
    rest = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    content["digest"] = sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(content, indent=2) + "\n")


def use(root: Path) -> None:
    """Open a bundle, run it on a picture, draw the answer."""
    picture = np.full((64, 72, 3), 90, np.uint8)
    with closing(open_system(read(root), backend="ort", precision="float", threads=1)) as system:
        for result in system.infer([picture]):
            json.dumps(result.to_json())
            system.draw(picture, result)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield (*path, key)
        yield from leaves(tree[key], (*path, key))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's of values that are too large
        yield


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_manifests(
    name: str, bundles: dict[str, Bundle], tmp_path: Path, ledger: Ledger, rng: random.Random
) -> None:
    root = tmp_path / name
    shutil.copytree(bundles[name].root, root)
    text = (root / MANIFEST_NAME).read_text()
    places = [p for p in leaves(json.loads(text)) if p[0] not in ("files", "digest")]
    for _ in range(25 * ledger.scale):
        place, value = rng.choice(places), rng.choice(_VALUES)
        away = rng.random() < 0.2

        def change(content: Any, place: Any = place, value: Any = value, away: bool = away) -> None:
            for key in place[:-1]:
                content = content[key]
            content[place[-1]] = value
            if away:
                del content[place[-1]]

        (root / MANIFEST_NAME).write_text(text)
        seal(root, change)
        attempt(ledger, f"{place} = {value!r:.30}", lambda: use(root))


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_graphs_and_assets(
    name: str, bundles: dict[str, Bundle], tmp_path: Path, ledger: Ledger, rng: random.Random
) -> None:
    """In this process graphs are only checked: a backend may end it; see docs/reliability.md."""
    root = tmp_path / name
    shutil.copytree(bundles[name].root, root)
    found = sorted(path for path in root.iterdir() if path.name != MANIFEST_NAME)
    for i in range(15 * ledger.scale):
        path = rng.choice(found)
        data = path.read_bytes()
        broken = damaged(data, rng)
        if path.suffix == ".onnx":
            attempt(ledger, f"{path.name} {i}", lambda d=broken: check_graph(d, "x"))  # type: ignore[misc]
            continue
        path.write_bytes(broken)
        seal(root)
        attempt(ledger, f"{path.name} {i}", lambda: use(root))
        path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp", ".gif", ".jp2"])
def test_pictures(suffix: str, tmp_path: Path, ledger: Ledger, rng: random.Random) -> None:
    noise = np.random.default_rng(_SEED).integers(0, 255, (48, 56, 3), np.uint8)
    data = cv2.imencode(suffix, noise)[1].tobytes()
    path = tmp_path / "x.png"
    for i in range(25 * ledger.scale):
        path.write_bytes(damaged(data, rng))
        attempt(ledger, f"{suffix} {i}", lambda: images.read(path))
        attempt(ledger, f"mask {suffix} {i}", lambda: images.read_mask(path))
        attempt(ledger, f"planes {suffix} {i}", lambda: planes.read(path))


def test_planes(tmp_path: Path, ledger: Ledger, rng: random.Random) -> None:
    noise = np.random.default_rng(_SEED).random((24, 20, 3), np.float32)
    for suffix in (".tif", ".npy"):
        planes.write(tmp_path / f"good{suffix}", noise)
        data = (tmp_path / f"good{suffix}").read_bytes()
        path = tmp_path / f"x{suffix}"
        for i in range(40 * ledger.scale):
            path.write_bytes(damaged(data, rng))
            attempt(ledger, f"{suffix} {i}", lambda p=path: planes.read(p))  # type: ignore[misc]


def test_archives(tmp_path: Path, ledger: Ledger, rng: random.Random) -> None:
    rows = np.random.default_rng(_SEED).random((2, 6), np.float32)
    references.Prototypes(("a", "b"), rows, "0" * 64).save(tmp_path / "good.npz")
    data = (tmp_path / "good.npz").read_bytes()
    array = io.BytesIO()
    np.save(array, rows)
    path = tmp_path / "x.npz"
    for i in range(60 * ledger.scale):
        path.write_bytes(damaged(data, rng))
        attempt(ledger, f"prototypes {i}", lambda: references.Prototypes.load(path))
        attempt(ledger, f"references {i}", lambda: references.load_references(path))
        broken = damaged(array.getvalue(), rng)
        attempt(ledger, f"array {i}", lambda d=broken: npy.decode(d, "x"))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "libx264"), ("avi", "mpeg4"), ("mkv", "libx264"), ("webm", "libvpx")],
)
def test_videos(
    suffix: str, codec: str, tmp_path: Path, ledger: Ledger, rng: random.Random
) -> None:
    path = tmp_path / f"x.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(8):
            picture = np.full((48, 64, 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()

    def every_way() -> None:
        times = [frame.time_s for frame in video.frames(path)]
        assert times == sorted(times)

    def any_frame() -> None:
        with video.VideoFile(path) as opened:
            opened.read(len(opened) - 1)

    for i in range(12 * ledger.scale):
        path.write_bytes(damaged(data, rng))
        attempt(ledger, f"{suffix} {i} frames", every_way)
        attempt(ledger, f"{suffix} {i} frame", any_frame)
