"""Pictures worth a look: near the border, or unlike those of the calibration, in a bounded folder.

They lie as a labelled set would hold them if the answers were right, with the result as JSON beside
each: whoever has looked, and moved what is wrong, can train on the folder, or add what is good in
it to a bank. The oldest go first.
"""

from __future__ import annotations

import io
import json
import re
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np

from engineworks.runtime import files, images
from engineworks.runtime.errors import UsageError
from engineworks.runtime.names import file_name
from engineworks.runtime.results import AnomalyMap, Classification, DefectMap, Detections
from engineworks.runtime.sinks import Item
from engineworks.runtime.systems import Promptable, Result, System
from engineworks.runtime.tables import record_of
from engineworks.runtime.tensors import Array
from engineworks.runtime.usual import Usual, brightness

FOLDER_NAME = "doubtful"
_NEAR = 0.1  # of the border: scores within a tenth of it
_SURE = 0.2  # by which the best class must lead
_PLANES = ".npy"
_COCO_NAME = "annotations_train.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def limit_of(text: str) -> int:
    """``doubtful:500MB`` -> bytes.

    Raises:
        UsageError: it is nothing of the kind.
    """
    match = re.fullmatch(r"doubtful:(\d{1,12})(|KB|MB|GB)", text, re.IGNORECASE)
    if match is None or not int(match[1]):
        raise UsageError(f"'{text}' keeps nothing", fix="write --keep doubtful:500MB")
    return int(match[1]) * _UNITS[match[2].upper()]


def doubt(result: Result) -> str | None:
    """Why an answer could as well be another one, in words; None where it could not."""
    match result:
        case AnomalyMap(score=score, threshold=border):
            scores = [score]
        case DefectMap(candidates=candidates, threshold=border):
            scores = [candidate.score for candidate in candidates]
        case Detections(objects=objects, border=border):
            scores = [found.score for found in objects]
        case Classification(is_unknown=True):
            return "of no known class"
        case Classification(prediction_set=classes) if classes is not None and len(classes) != 1:
            return f"{len(classes)} classes are possible"
        case Classification(top=((_, first), (_, second), *_)) if first - second < _SURE:
            return f"two classes are within {first - second:.2f}"
        case _:
            return None
    if border is None or not scores:
        return None
    nearest = min(scores, key=lambda score: abs(score - border))
    if abs(nearest - border) <= _NEAR * abs(border):
        return f"score {nearest:.4g} is near the border {border:.4g}"
    return None


def place_of(result: Result) -> str | None:
    """The folder of a labelled set that holds such pictures; None: none does."""
    match result:
        case AnomalyMap():
            return f"images/{'anomalous' if result.is_anomalous else 'good'}"
        case DefectMap():
            return "test/defective" if result.is_defective else "train/good"
        case Classification(label=label):
            return f"train/{file_name(label)}"
        case Detections():
            return "images"
    return None


class Doubtful:
    """A sink that keeps some pictures, whole, with their results.

    Attributes:
        num_kept: pictures of this run, those that had to go again included.
    """

    def __init__(self, system: System, folder: Path, limit_bytes: int) -> None:
        """Nothing is looked at before it is opened.

        Args:
            limit_bytes: of all files in the folder, those of earlier runs included.
        """
        self.num_kept = 0
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._usual = Usual.in_reports(system.bundle.manifest.reports)
        self._labels = system.names() if isinstance(system, Promptable) else ()
        self._planes = _PLANES in system.reader.suffixes
        self._kept: deque[tuple[Path, int]] = deque()  # pictures, oldest first, and bytes of both
        self._num_bytes = 0

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        files.sweep(self._folder, deep=True)
        found = [path for path in self._folder.rglob("*.json") if _is_ours(path)]
        for record in sorted(found, key=lambda path: path.name):
            picture = record.with_suffix(_PLANES if self._planes else ".png")
            size = sum(path.stat().st_size for path in (record, picture) if path.exists())
            self._note(picture, size)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._labels:
            self._write_coco()

    def failed(self, item: Item, error: str) -> None:
        """Without an answer there is no doubt about it."""

    def add(self, item: Item, image: Array, result: Result) -> None:
        """Keep a picture, where there is a reason."""
        place = place_of(result)
        reason = doubt(result) or self._unlike(image)
        if place is None or reason is None:
            return
        suffix = _PLANES if self._planes else ".png"
        content = _npy(image) if self._planes else images.encode(image, suffix)
        record = {**record_of(item, image, result), "kept": reason}
        line = json.dumps(record, indent=1) + "\n"
        size = len(content) + len(line)
        if size > self._limit_bytes:
            return
        while self._num_bytes + size > self._limit_bytes:
            self._remove_oldest()
        path = self._folder / place / f"{self._name(item)}{suffix}"
        files.write(path, content, durable=False)
        files.write(path.with_suffix(".json"), line, durable=False)
        self._note(path, size)
        self.num_kept += 1

    def _unlike(self, image: Array) -> str | None:
        """Why a picture is unlike the calibration's."""
        if self._usual is None:
            return None
        level, known = brightness(image), self._usual.brightness
        if known[0] <= level <= known[-1]:
            return None
        return f"brightness {level:.4g}, of the calibration {known[0]:.4g} to {known[-1]:.4g}"

    def _name(self, item: Item) -> str:
        """Names are in the order of time."""
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        frame = "" if item.index is None else f"-{item.index}"
        stem = file_name((item.camera or Path(item.name).stem)[:40])
        return f"{now}-{self.num_kept:06}-{stem}{frame}"

    def _note(self, path: Path, size: int) -> None:
        self._kept.append((path, size))
        self._num_bytes += size

    def _remove_oldest(self) -> None:
        path, size = self._kept.popleft()
        self._num_bytes -= size
        for each in (path, path.with_suffix(".json")):
            each.unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            path.parent.rmdir()

    def _write_coco(self) -> None:
        """Boxes of all that is kept, as training reads them."""
        numbers = {name: i + 1 for i, name in enumerate(dict.fromkeys(self._labels))}
        pictures: list[dict[str, Any]] = []
        boxes: list[dict[str, Any]] = []
        for path, _ in self._kept:
            if not path.exists():
                continue
            record = json.loads(path.with_suffix(".json").read_bytes())
            size = {"width": record["width"], "height": record["height"]}
            pictures.append({"id": len(pictures) + 1, "file_name": path.name, **size})
            for found in record["objects"]:
                if found["name"] in numbers:
                    x, y = found["x1"], found["y1"]
                    box = [x, y, round(found["x2"] - x, 2), round(found["y2"] - y, 2)]
                    number = {"id": len(boxes) + 1, "image_id": len(pictures)}
                    boxes.append(
                        {
                            **number,
                            "category_id": numbers[found["name"]],
                            "bbox": box,
                            "area": round(box[2] * box[3], 2),
                            "iscrowd": 0,
                        }
                    )
        categories = [{"id": number, "name": name} for name, number in numbers.items()]
        table = {"images": pictures, "annotations": boxes, "categories": categories}
        files.write(self._folder / _COCO_NAME, json.dumps(table, indent=1) + "\n")


def _is_ours(path: Path) -> bool:
    return re.match(r"\d{8}T\d{12}-", path.name) is not None


def _npy(image: Array) -> bytes:
    content = io.BytesIO()
    np.save(content, image)
    return content.getvalue()
