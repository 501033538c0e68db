"""``batch`` as a process, with a cluster of Ray of its own; and the mapper in a dataset."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from engineworks import testing
from engineworks.batch import schema_of
from engineworks.batch.blocks import RECORD_NAME
from engineworks.runtime.tables import LINES_NAME
from tests.command import LIMIT_S, cli

ROOT = Path(__file__).parents[1]

# not imported: it starts threads
if importlib.util.find_spec("ray") is None:
    pytest.skip("the extra 'ray' is not here: make test-ray", allow_module_level=True)

NUM_PICTURES, BLOCK = 1200, 8
NUM_BLOCKS = NUM_PICTURES // BLOCK


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, and a long list of few pictures, one of them broken."""
    folder = tmp_path_factory.mktemp("batch")
    testing.write_tiny_noising_bundle(folder / "bundle")
    testing.write_parts(folder / "data")
    pictures = [str(path) for path in sorted((folder / "data" / "test").rglob("*.png"))]
    (folder / "broken.png").write_bytes(b"no picture")
    listed = [pictures[i % len(pictures)] for i in range(NUM_PICTURES)]
    listed[NUM_PICTURES // 2] = str(folder / "broken.png")
    (folder / "list.txt").write_text("\n".join(listed))
    return folder


def start(root: Path, out: Path, *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, ROOT / "cli.py", "batch", root / "bundle", "--out", out]
    command += ["--source", root / "list.txt", "--actors", 2, "--block", BLOCK, *more]
    return subprocess.Popen(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(what: Callable[[], Any]) -> Any:
    until = time.monotonic() + LIMIT_S
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.005)
    return found


def children(pid: int) -> dict[int, str]:
    """All processes below one, with what they call themselves."""
    found, waiting = {}, [pid]
    while waiting:
        for tasks in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            for child in tasks.read_text().split():
                name = Path(f"/proc/{child}/cmdline")
                found[int(child)] = name.read_text() if name.exists() else ""
                waiting.append(int(child))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def blocks(out: Path) -> list[Path]:
    return sorted(out.glob("block-*.parquet"))


class TestABatch:
    def test_is_whole_after_its_driver_and_an_actor_were_killed(
        self, root: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        first = start(root, out)
        wait_for(lambda: len(blocks(out)) > 3)
        below = children(first.pid)
        first.kill()
        first.communicate()
        wait_for(lambda: not any(map(is_alive, below)))
        there = {path: path.stat().st_mtime_ns for path in blocks(out)}
        assert 3 < len(there) < NUM_BLOCKS

        second = start(root, out)
        wait_for(lambda: len(blocks(out)) > len(there))
        actors = [pid for pid, name in children(second.pid).items() if "MapWorker" in name]
        os.kill(actors[0], signal.SIGKILL)
        assert len(blocks(out)) < NUM_BLOCKS
        said, told = second.communicate(timeout=LIMIT_S)

        assert second.returncode == 1, told  # of the broken picture
        assert said.startswith(f"{NUM_PICTURES - 1} done, 1 failed")
        lines = told.splitlines()
        assert f"{len(there)} of {NUM_BLOCKS} blocks are there already" in lines
        known = ("openvino,", "ort,", "Ray is", "skipped", f"{len(there)} of", "batch: ")
        assert [line for line in lines if not line.startswith(known)] == []
        assert {path: path.stat().st_mtime_ns for path in there} == there
        names = {path.name for path in out.iterdir()}
        assert names == {RECORD_NAME, *(f"block-{i:06d}.parquet" for i in range(NUM_BLOCKS))}

        table = parquet.read_table(out)
        assert table.schema == schema_of("noising")
        infer = cli(
            *("infer", root / "bundle", "--source", root / "list.txt"),
            *("--out", tmp_path / "plain", "--jsonl", "--threads", 1),
        )
        assert infer.code == 1, infer.all
        expected = map(json.loads, (tmp_path / "plain" / LINES_NAME).read_text().splitlines())
        rows = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
        assert rows == list(expected)

    def test_ends_at_a_signal_and_keeps_what_is_done(self, root: Path, tmp_path: Path) -> None:
        running = start(root, tmp_path)
        wait_for(lambda: blocks(tmp_path))
        below = children(running.pid)
        running.send_signal(signal.SIGTERM)
        said, told = running.communicate(timeout=LIMIT_S)
        assert running.returncode == 128 + signal.SIGTERM, told
        assert "Traceback" not in told
        rows = sum(parquet.read_metadata(path).num_rows for path in blocks(tmp_path))
        num_done, num_failed = (int(part.split()[0]) for part in said.split(", ")[:2])
        assert 0 < num_done + num_failed == rows < NUM_PICTURES
        wait_for(lambda: not any(map(is_alive, below)))


# a program of a user, who looks at what Ray listens at as well
_PROGRAM = """
import json, sys
from pathlib import Path
from engineworks import read_image
from engineworks.batch import Mapper
from engineworks.batch.cluster import joined

root, out = map(Path, sys.argv[1:])
listening = []
with joined(None, 2):
    import ray.data
    from ray.data import ActorPoolStrategy
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            listening += [(fields[1].split(":")[0], fields[9])] if fields[3] == "0A" else []
    (out / "listening.json").write_text(json.dumps(listening))
    (out / "go").touch()
    sys.stdin.readline()
    pictures = ray.data.read_binary_files(str(root / "data" / "test"), include_paths=True)
    pictures.write_parquet(str(out / "packed"))
    decoded = pictures.map(
        lambda row: {"path": row["path"], "image": read_image(row["path"])}
    )  # as read_images does, which needs Pillow
    packed = ray.data.read_parquet(str(out / "packed"))
    for name, rows in {"files": pictures, "images": decoded, "parquet": packed}.items():
        rows = rows.map_batches(
            Mapper,
            fn_constructor_args=(root / "bundle",),
            compute=ActorPoolStrategy(size=1),
            batch_size=3,
            num_cpus=1,
        )
        rows.write_parquet(str(out / name))
"""


def test_a_mapper_takes_whatever_ray_reads(root: Path, tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(root), str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: (tmp_path / "go").exists() or program.poll() is not None)
    own = sockets([program.pid, *children(program.pid)])
    said, told = program.communicate("\n", timeout=LIMIT_S)
    assert program.returncode == 0, said + told

    listening = json.loads((tmp_path / "listening.json").read_text())
    addresses = {address for address, inode in listening if inode in own}
    # 127.0.0.1, and the same as an address of IPv6; in the byte order of the processor
    assert addresses
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}

    tables = {
        name: parquet.read_table(tmp_path / name).sort_by("source")
        for name in ("files", "images", "parquet")
    }
    pictures = sorted(str(path) for path in (root / "data" / "test").rglob("*.png"))
    for table in tables.values():
        assert table["source"].to_pylist() == pictures
        assert table.equals(tables["files"])
        assert not any(table["error"].to_pylist())
        assert not any(isinstance(kind, pa.BaseExtensionType) for kind in table.schema.types)


def sockets(pids: list[int]) -> set[str]:
    """The inodes of the sockets that processes have."""
    links = [link for pid in pids for link in Path(f"/proc/{pid}/fd").glob("*")]
    targets = [str(link.readlink()) for link in links if link.is_symlink()]
    return {name.removeprefix("socket:[").rstrip("]") for name in targets if "socket:" in name}
