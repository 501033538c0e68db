"""Labelled folders of drawn pictures, in the layouts that the systems read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engineworks.runtime import images, planes
from engineworks.runtime.testing.drawings import (
    COLOURS,
    draw_flower,
    draw_part,
    draw_reference,
    draw_scene,
    draw_strip,
)


def write_parts(
    root: Path,
    *,
    size: tuple[int, int] = (64, 64),
    num_train: int = 8,
    num_good: int = 4,
    num_defective: int = 4,
    seed: int = 0,
) -> Path:
    """An MVTec-style folder of ``draw_part`` pictures, masks included; returns ``root``."""
    rng = np.random.default_rng(seed)
    counts = {"train/good": num_train, "test/good": num_good, "test/scratch": num_defective}
    for folder, count in counts.items():
        for i in range(count):
            image, mask = draw_part(rng, size, defective=folder.endswith("scratch"))
            images.write(root / folder / f"{i:03d}.png", image)
            if mask.any():
                name = f"{i:03d}_mask.png"
                images.write(root / "ground_truth/scratch" / name, mask.astype(np.uint8) * 255)
    return root


def write_flowers(
    root: Path,
    *,
    size: tuple[int, int] = (64, 64),
    num_train: int = 4,
    num_test: int = 2,
    seed: int = 0,
) -> Path:
    """A folder of ``draw_flower`` pictures by class, in train and test; returns ``root``."""
    rng = np.random.default_rng(seed)
    for split, count in {"train": num_train, "test": num_test}.items():
        for label in COLOURS:
            for i in range(count):
                path = root / split / label / f"{i:03d}.png"
                images.write(path, draw_flower(rng, size, label))
    return root


def write_strips(
    root: Path,
    *,
    size: tuple[int, int] = (96, 64),
    num_train: int = 4,
    num_good: int = 4,
    num_defective: int = 4,
    seed: int = 0,
) -> Path:
    """A folder of ``draw_strip`` planes, masks included; returns ``root``."""
    rng = np.random.default_rng(seed)
    counts = {"train/good": num_train, "test/good": num_good, "test/spot": num_defective}
    for folder, count in counts.items():
        for i in range(count):
            strip, mask = draw_strip(rng, size, defective=folder.endswith("spot"))
            planes.write(root / folder / f"{i:03d}.png", strip)
            if mask.any():
                path = root / "ground_truth/spot" / f"{i:03d}_mask.png"
                images.write(path, mask.astype(np.uint8) * 255)
    return root


def write_references(
    root: Path, names: Sequence[str], *, size: tuple[int, int] = (48, 40), num: int = 2
) -> Path:
    """A folder of ``draw_reference`` pictures per object; returns ``root``."""
    rng = np.random.default_rng(2)
    for name in names:
        for i in range(num):
            images.write(root / name / f"{i}.png", draw_reference(rng, size, name))
    return root


def write_scenes(
    root: Path,
    *,
    size: tuple[int, int] = (64, 96),
    names: Sequence[str] = ("blue", "red", "yellow"),
    num_train: int = 4,
    num_test: int = 4,
    seed: int = 0,
) -> Path:
    """A folder of ``draw_scene`` pictures, their boxes in COCO's form, and references.

    The n-th picture lacks the n-th object, counted in a circle; returns ``root``.
    """
    rng = np.random.default_rng(seed)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    for split, count in {"train": num_train, "test": num_test}.items():
        listed: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            shown = [name for k, name in enumerate(names) if k != i % len(names)]
            image, found = draw_scene(rng, size, shown)
            file = f"{split}_{i:03d}.png"
            images.write(root / "images" / file, image)
            listed.append({"id": i + 1, "file_name": file, "width": size[1], "height": size[0]})
            for name, (x1, y1, x2, y2) in zip(shown, found.tolist(), strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i + 1,
                        "category_id": names.index(name) + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
        content = {"images": listed, "categories": categories, "annotations": annotations}
        path = root / f"annotations_{split}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
    write_references(root / "references", names)
    return root
