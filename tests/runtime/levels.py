"""A system that measures how bright pictures are, and what inference writes of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from engineworks.runtime import images, video
from engineworks.runtime.engines import Engine
from engineworks.runtime.sources import PICTURES, Reader
from engineworks.runtime.tensors import Array


@dataclass(frozen=True)
class Level:
    """The answer of ``Levels``: how bright a picture is."""

    level: float

    def to_json(self) -> dict[str, Any]:
        return {"level": self.level, "of": {"kind": "grey", "deep": {"x": 1}}, "boxes": [[1, 2]]}

    def summary(self) -> str:
        return f"level {self.level:.0f}"


@dataclass(frozen=True)
class Marked(Level):
    """A level with as many marks."""

    def to_json(self) -> dict[str, Any]:
        marks = [{"x": i, "at": {"y": 10 + i}} for i in range(int(self.level))]
        return {"level": self.level, "marks": marks}


BUNDLE = SimpleNamespace(manifest=SimpleNamespace(reports={}))  # that says nothing of itself


@dataclass
class Levels:
    """A system that measures the mean of a picture and notes how it was called."""

    reader: ClassVar[Reader] = PICTURES
    bundle: ClassVar[Any] = BUNDLE
    engines: Mapping[str, Engine] = field(default_factory=dict)
    backend: str = "none"
    precision: str = "float"
    batches: list[int] = field(default_factory=list)
    before: Callable[[], object] = lambda: None

    def infer(self, images: Sequence[Array]) -> list[Level]:
        assert images, "a system is never called without pictures"
        self.before()
        self.batches.append(len(images))
        return [Level(float(image.mean())) for image in images]

    def draw(self, image: Array, result: Level) -> Array:
        return np.full_like(image, round(result.level))

    def evaluate(self, data: Path, *, progress: Any = None) -> dict[str, float]:
        raise NotImplementedError

    def close(self) -> None: ...


def grey(level: int, height: int = 16, width: int = 24) -> Array:
    return np.full((height, width, 3), level, np.uint8)


def write_pictures(folder: Path, levels: Sequence[int]) -> None:
    for i, level in enumerate(levels):
        images.write(folder / f"{i:03}.png", grey(level))


def write_video(path: Path, times: Sequence[float]) -> None:
    with video.VideoWriter(path, Fraction(25)) as writer:
        for i, time_s in enumerate(times):
            writer.write(grey(20 + 20 * (i % 10), 48, 64), time_s)


def lines(out: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (out / "results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def table(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
