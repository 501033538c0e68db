"""Pictures of a folder through actors of Ray Data, block by block.

    sources -> shares -> dataset of Ray, a row per missing block -> actors -> parquet files

What goes through Ray are names and counts; an actor reads the pictures of a block and writes its
file. One that dies is started again and does its block anew.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from engineworks.batch import cluster
from engineworks.batch.blocks import Blocks, attempt, block_path, write
from engineworks.batch.mapper import Mapper
from engineworks.runtime.claims import claim
from engineworks.runtime.engines import BACKENDS
from engineworks.runtime.errors import BackendError, EngineworksError, UsageError
from engineworks.runtime.references import SUFFIX, View, read_references
from engineworks.runtime.sources import Reader, Source, open_source

Progress = Callable[[int, int], None]
Say = Callable[[str], None]

BLOCK = 256  # pictures
_TRIES = 3  # of a block whose actor dies; Ray would go on for ever

_ASKED = pa.schema([("block", pa.int64()), ("sources", pa.list_(pa.binary()))])
_ANSWERED = pa.schema([("rows", pa.int64()), ("failures", pa.list_(pa.list_(pa.string())))])


@dataclass
class Summary:
    """What came of a job.

    Attributes:
        num_done, num_failed: pictures of all blocks, those of earlier runs included.
        failures: (source, message) of this run's.
        num_new: pictures of this run; ``seconds`` of it, the start of Ray not included.
    """

    num_done: int = 0
    num_failed: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    num_new: int = 0
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.num_new / self.seconds if self.seconds else 0.0


def run(
    opening: partial[Mapper],
    text: str,
    out: Path,
    *,
    actors: int = 1,
    block: int = BLOCK,
    address: str | None = None,
    progress: Progress,
    say: Say,
    summary: Summary,
) -> None:
    """Answer all pictures of a source in a folder of blocks, those that are not there yet.

    Args:
        opening: makes the mapper; it is called here once, and in every actor.
        text: a picture, folder, glob or list, as ``sources.open_source`` takes it.
        actors: processes, each with the mapper's threads.
        block: pictures of a file.
        address: of a cluster of Ray where ``bundle``, source and ``out`` are the same files on
            every machine; None: this machine alone.
        progress: called with (done, total) pictures.
        summary: is filled; also where an error or interrupt is raised.

    Raises:
        UsageError: a source that is no pictures; ``out`` holds something else or what was made
            otherwise.
        InUseError: another process writes there.
        ResourceError: actors died several times over one block.
        EngineworksError: see ``Mapper``, which is opened here first.
    """
    with opening() as mapper:
        backend, precision = mapper.system.backend, mapper.system.precision
        say(f"{backend}, {precision}")
        blocks = Blocks(out, _pictures(text, mapper.system.reader), block)
        settings = _settings(mapper, opening)
        digest = mapper.system.bundle.manifest.digest
    out.mkdir(parents=True, exist_ok=True)
    with claim(out):
        blocks.begin(settings)
        # auto means the same in every actor, and the bundle stays the same
        same = partial(opening, backend=backend, precision=precision, digest=digest)
        try:
            if missing := blocks.missing():
                if len(missing) < len(blocks):
                    say(f"{len(blocks) - len(missing)} of {len(blocks)} blocks are there already")
                _work(blocks, missing, same, actors, address, progress, say, summary)
        finally:
            summary.num_done, summary.num_failed = blocks.counts()


def _pictures(text: str, reader: Reader) -> tuple[str, ...]:
    source: Source = open_source(text, reader)
    if source.kind != "images":
        raise UsageError(f"{text} is no pictures", fix="take `infer` for videos and streams")
    return tuple(map(str, source.paths))


def _settings(mapper: Mapper, opening: partial[Mapper]) -> dict[str, Any]:
    """What rows depend on beside their sources."""
    given, manifest = opening.keywords, mapper.system.bundle.manifest
    refs = given.get("refs", ())
    return {
        "system": manifest.system,
        "bundle": manifest.digest,
        "backend": mapper.system.backend,
        "precision": mapper.system.precision,
        "references": _digest(tuple(map(Path, refs))) if refs else None,
        **{name: given.get(name) for name in ("conf", "iou", "batch", "maps")},
    }


def _digest(refs: tuple[Path, ...]) -> str:
    """SHA-256 of the references: of a file of them, or of names, boxes and pixels."""
    hashed = hashlib.sha256()
    if refs[0].suffix == SUFFIX:
        hashed.update(refs[0].read_bytes())
        return hashed.hexdigest()
    for name, pictures in read_references(*refs).items():
        for picture in pictures:
            view = picture if isinstance(picture, View) else View(picture, (0, 0, 0, 0))
            hashed.update(f"{name}\0{view.image.shape}\0{view.box}\0".encode())
            hashed.update(view.image.tobytes())
    return hashed.hexdigest()


def _work(
    blocks: Blocks,
    missing: Sequence[int],
    opening: partial[Mapper],
    actors: int,
    address: str | None,
    progress: Progress,
    say: Say,
    summary: Summary,
) -> None:
    threads = opening.keywords["threads"]
    actors = min(actors, len(missing))
    num_there = len(blocks.sources) - sum(len(blocks.share(number)) for number in missing)
    begin = time.perf_counter()
    with cluster.joined(address, actors * threads):
        say(f"Ray is there after {time.perf_counter() - begin:.1f} s")
        begin = time.perf_counter()
        try:
            for num_rows, failures in _answers(blocks, missing, opening, actors):
                summary.num_new += num_rows
                summary.failures += failures
                progress(num_there + summary.num_new, len(blocks.sources))
        finally:
            summary.seconds = time.perf_counter() - begin


def _answers(
    blocks: Blocks, missing: Sequence[int], opening: partial[Mapper], actors: int
) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """Of each block that is done, its rows and its failures, as they come."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext, from_arrow

    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.raise_original_map_exception = True
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    asked = [_row(number, blocks.share(number)) for number in missing]
    done = from_arrow(asked).map_batches(
        _Writer,
        fn_constructor_args=(opening, blocks.out, Path.cwd()),
        batch_size=None,
        batch_format="pyarrow",
        # one block at an actor: another one may be quicker with the next
        compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        num_cpus=opening.keywords["threads"],
        num_gpus=_share_of_gpu(opening.keywords["backend"], actors),
    )
    try:
        for answered in done.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in answered.to_pylist():
                yield row["rows"], [(source, message) for source, message in row["failures"]]
    except ray.exceptions.RayError as error:
        explained = _explained(error)
        if explained is error:
            raise
        raise explained from error


def _row(number: int, sources: Sequence[str]) -> Any:
    columns = {"block": [number], "sources": [list(map(os.fsencode, sources))]}
    return pa.table(columns, schema=_ASKED)


def _share_of_gpu(backend: str, actors: int) -> float:
    """Of one GPU, for each actor: all are used, and an actor is on one."""
    if not BACKENDS[backend].needs_gpu:
        return 0
    import ray

    if not (num_gpus := int(ray.cluster_resources().get("GPU", 0))):
        raise BackendError(f"'{backend}' needs a GPU, and Ray has none", fix="ask for another one")
    return 1 / -(-actors // num_gpus)


def _explained(error: BaseException) -> BaseException:
    """What is behind an error of Ray: our own, or one of the system's, if there is one."""
    from ray.exceptions import RayTaskError

    seen: BaseException | None = error
    while seen is not None:
        # it is of the class of its cause too, with a traceback for its message
        of_task = isinstance(seen, RayTaskError)
        if not of_task and isinstance(seen, EngineworksError | OSError):
            return seen
        seen = seen.cause if of_task else seen.__cause__  # type: ignore[attr-defined]
    return error


class _Writer:
    """Answers the pictures of a block and writes its file; lives in an actor.

    Opens the bundle once, for its first block.
    """

    def __init__(self, opening: partial[Mapper], out: Path, folder: Path) -> None:
        """Open nothing yet: Ray tells what is wrong with an answer, not what is with an actor.

        Args:
            folder: that paths are relative to.
        """
        os.chdir(folder)
        self._out = out
        self._opening = opening
        # maps take much room: they are written as they come
        self._piece = opening.keywords["batch"] if opening.keywords["maps"] else None

    @cached_property
    def _mapper(self) -> Mapper:
        return self._opening()

    def __call__(self, rows: Any) -> Any:
        answered = []
        for row in rows.to_pylist():
            sources = tuple(map(os.fsdecode, row["sources"]))
            with attempt(self._out, row["block"], _TRIES):
                failures = self._write(block_path(self._out, row["block"]), sources)
            answered.append({"rows": len(sources), "failures": failures})
        return pa.Table.from_pylist(answered, schema=_ANSWERED)

    def _write(self, path: Path, sources: Sequence[str]) -> list[list[str]]:
        """Write a block; (source, message) of what of it failed."""
        failures: list[list[str]] = []

        def tables() -> Iterator[Any]:
            piece = self._piece or len(sources)
            for at in range(0, len(sources), piece):
                table = self._mapper.read(sources[at : at + piece])
                told = zip(*(table[name].to_pylist() for name in ("source", "error")), strict=True)
                failures.extend([source, error] for source, error in told if error is not None)
                yield table

        write(path, self._mapper.schema, tables())
        return failures
