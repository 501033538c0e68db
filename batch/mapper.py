"""A bundle in an actor: batches of a dataset in, rows of answers out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np

from engineworks.batch.rows import map_of, schema_of, table_of
from engineworks.runtime.errors import BundleError, ImageError, InputError
from engineworks.runtime.infer import answers
from engineworks.runtime.sinks import Item
from engineworks.runtime.systems import Result, System, open_bundle, prompt
from engineworks.runtime.tables import NOT_FINITE, failure_of, line_of, record_of
from engineworks.runtime.tensors import Array

# name of a picture, and what decodes it
_Asked: TypeAlias = tuple[str, Callable[[], Array]]

_NAMES, _PICTURES = ("source", "path"), ("bytes", "image")


class Mapper:
    """Answers batches of pictures; ``ray.data.Dataset.map_batches`` makes one in each actor.

    It opens the bundle once. An object of it can be sent to another process, which opens it again.

    Attributes:
        system: the opened bundle.
        schema: of all that is answered, a ``pyarrow.Schema``: a function of the bundle's system and
            ``maps``, see ``schema_of``.
    """

    def __init__(
        self,
        bundle: str | Path,
        *,
        refs: Sequence[str | Path] = (),
        conf: float | None = None,
        iou: float | None = None,
        backend: str = "auto",
        precision: str = "auto",
        threads: int = 1,
        batch: int = 8,
        maps: bool = False,
        signers: Sequence[str | Path] = (),
        host_code: bool = False,
        digest: str | None = None,
    ) -> None:
        """Open a bundle.

        Args:
            bundle: its folder, which must be there on each machine.
            refs, conf, iou: what to look for and how, see ``runtime.systems.prompt``.
            backend, precision, host_code: see ``open_bundle``.
            threads: CPU threads of inference; one more decodes beside it. Give Ray the same number
                as ``num_cpus``.
            batch: pictures per call of the net.
            maps: rows have the maps of scores as well.
            signers: public keys; one of them must have signed the bundle where any is given.
            digest: that the bundle must have; None takes any.

        Raises:
            BundleError: no bundle there, a broken one, not signed, or another than ``digest``.
            UsageError: the system takes no references, or gives no maps.
            InputError, ImageError: no references there, or one that cannot be read.
            BackendError, EngineError: see ``open_bundle``.
        """
        self._again = partial(
            type(self),
            bundle,
            refs=refs,
            conf=conf,
            iou=iou,
            backend=backend,
            precision=precision,
            threads=threads,
            batch=batch,
            maps=maps,
            signers=signers,
            host_code=host_code,
            digest=digest,
        )
        self._batch, self._maps = batch, maps
        self.system: System = open_bundle(
            bundle,
            backend=backend,
            precision=precision,
            threads=threads,
            signers=[Path(key) for key in signers],
            host_code=host_code,
        )
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        try:
            manifest = self.system.bundle.manifest
            if digest not in (None, manifest.digest):
                raise BundleError(
                    f"{bundle} is another bundle than the one that was asked for: its digest is "
                    f"{manifest.digest[:12]}, not {str(digest)[:12]}",
                    fix="put that one back, or begin anew",
                )
            self.schema = schema_of(manifest.system, maps=maps)
            prompt(self.system, *map(Path, refs), conf=conf, iou=iou)
        except BaseException:
            self.close()
            raise

    def __reduce__(self) -> tuple[Callable[[], Mapper], tuple[()]]:
        return self._again, ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the bundle's engines and the decoder's thread."""
        self._decoder.shutdown()
        self.system.close()

    def __call__(self, rows: Mapping[str, Array]) -> Any:
        """Answer a batch, as ``map_batches`` gives it in its default format.

        Args:
            rows: columns of equal length: ``source`` or ``path``, what answers call the picture;
                and ``bytes``, its file (or a struct with such a field, as Hugging Face has it), or
                ``image``, either that or (H, W, 3) uint8 RGB. Others are left out.

        Returns:
            A ``pyarrow.Table`` of ``schema``, a row per picture in their order. One that cannot be
            decoded, or that the system refuses, has its ``error`` and nothing else.

        Raises:
            InputError: such a column is missing.
        """
        names = next((rows[column] for column in _NAMES if column in rows), None)
        pictures = next((rows[column] for column in _PICTURES if column in rows), None)
        if names is None or pictures is None:
            raise InputError(
                f"the rows have the columns {', '.join(rows) or 'none'}",
                fix="give 'path' or 'source' (include_paths=True), and 'bytes' or 'image'",
            )
        return self._answer(
            [
                (str(name), partial(self._decode, picture, str(name)))
                for name, picture in zip(names, pictures, strict=True)
            ]
        )

    def read(self, paths: Sequence[str]) -> Any:
        """Likewise, of files: as ``infer`` reads them, also where several files are one image."""
        reader = self.system.reader
        return self._answer([(path, partial(reader.read, Path(path))) for path in paths])

    def _decode(self, picture: Any, name: str) -> Array:
        if isinstance(picture, Mapping):
            picture = picture.get("bytes")
        if isinstance(picture, bytes):
            return self.system.reader.decode(picture, name)
        if isinstance(picture, np.ndarray):
            return picture
        raise ImageError(f"{name} has no picture in its row")

    def _answer(self, asked: Sequence[_Asked]) -> Any:
        records: list[dict[str, Any]] = []
        for items in self._decoded(asked):
            there = [item.image for item in items if item.image is not None]
            results = iter(answers(self.system, there))
            for item in items:
                answer = item.error or "" if item.image is None else next(results)
                records.append(self._record(item, answer))
        return table_of(records, self.schema)

    def _decoded(self, asked: Sequence[_Asked]) -> Iterator[list[Item]]:
        """Batches of pictures; the next one is decoded meanwhile."""
        parts = [asked[i : i + self._batch] for i in range(0, len(asked), self._batch)]
        ahead = self._decoder.submit(_items, parts[0]) if parts else None
        for following in [*parts[1:], None]:
            if ahead is None:
                return
            items = ahead.result()
            ahead = None if following is None else self._decoder.submit(_items, following)
            yield items

    def _record(self, item: Item, answer: Result | str) -> dict[str, Any]:
        if isinstance(answer, str):
            return failure_of(item, answer)
        assert item.image is not None
        record = record_of(item, item.image, answer)
        if line_of(record) is None:
            return failure_of(item, NOT_FINITE)
        return {**record, **map_of(answer)} if self._maps else record


def _items(asked: Sequence[_Asked]) -> list[Item]:
    return [_item(name, decode) for name, decode in asked]


def _item(name: str, decode: Callable[[], Array]) -> Item:
    try:
        return Item(name, decode())
    except ImageError as error:
        return Item(name, error=error.message)
