"""What a data set holds, before it is learnt from: a table, what is wrong, a page to look at.

The quick half looks at files and decodes masks alone; the whole decodes every picture as well, and
finds damage within and pictures that are there twice.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engineworks.runtime import draw, headers, images, masks, video
from engineworks.runtime.datasets import NORMAL
from engineworks.runtime.errors import EngineworksError
from engineworks.runtime.folders import Tally
from engineworks.runtime.labels import Faults, Item, Labelled
from engineworks.runtime.report import Report
from engineworks.runtime.tensors import Array

HEADER = ("split", "pictures", "sizes", "classes", "boxes", "masks")

_MAX_CLASSES = 6  # that a cell of the table names
_MAX_FIGURES = 8  # of a split
_SIDE = 640  # of a figure at most, in pixels
_MOST_MARKED = 0.5  # of a picture: more is rather a mask the other way round

_UNREADABLE = "pictures that cannot be read"
_UNREADABLE_FIX = "copy them again, or remove them"

Progress = Callable[[int, int], None]


@dataclass
class Survey:
    """What was found.

    Attributes:
        rows: a row per split, see ``HEADER``.
        faults: labels that contradict each other or their pictures: training would be wrong.
        notes: what is done with labels that are not quite right, and what makes metrics doubtful.
        left_out: what lies in the folder and is no part of any split.
    """

    rows: list[tuple[str, ...]]
    left_out: Tally
    faults: Faults = field(default_factory=Faults)
    notes: Tally = field(default_factory=Tally)


def survey(labelled: Labelled, *, quick: bool = False, progress: Progress | None = None) -> Survey:
    """Look at all splits of a data set.

    Args:
        quick: decode masks alone.
        progress: called with (pictures done, pictures in all).
    """
    found = Survey([], labelled.left_out)
    found.notes.merge(labelled.notes)
    for faults in {id(each): each for each in labelled.faults.values()}.values():
        found.faults.merge(faults)
        found.faults.fixes.update(faults.fixes)
    total = sum(map(len, labelled.splits.values()))
    contents: dict[str, list[tuple[str, Item]]] = defaultdict(list)
    lengths: dict[Path, int] = {}
    done = 0
    for split, items in labelled.splits.items():
        sizes: Counter[tuple[int, int]] = Counter()
        for item in items:
            _check_mask(split, item, found)
            _check_frame(split, item, lengths, found.faults)
            header = None if item.packed or item.frame is not None else headers.read(item.files[0])
            size = header.size if header else None
            _check_captures(split, item, found.faults)
            if quick:
                _check_files(item, found.faults)
            else:
                size = _read(split, item, found.faults)
                if size:
                    contents[_content(item)].append((split, item))
            if size:
                sizes[size] += 1
            done += 1
            if progress:
                progress(done, total)
        found.rows.append(_row(split, items, sizes))
    _check_classes(labelled, found.notes)
    for alike in contents.values():
        _check_alike(alike, found)
    return found


def _check_mask(split: str, item: Item, found: Survey) -> None:
    if item.mask is None:
        return
    name = f"{split}: {item.mask.parent.name}/{item.mask.name}"
    try:
        values = images.read_mask(item.mask)
    except EngineworksError as error:
        found.faults.note("masks that cannot be read", error.message, "copy them again")
        return
    if fault := masks.fault_in(values, item.mask):
        found.faults.note(fault[0], name, fault[1])
    elif (values > 0).mean() > _MOST_MARKED:
        found.notes.add("masks that mark most of their picture", name)


def _check_frame(split: str, item: Item, lengths: dict[Path, int], faults: Faults) -> None:
    """Refuse labels of frames that a video does not have."""
    if item.frame is None:
        return
    path = item.files[0]
    if path not in lengths:
        try:
            lengths[path] = video.info(path).num_frames
        except EngineworksError as error:
            lengths[path] = 0
            faults.note("videos that cannot be read", error.message, "copy them again")
    if 0 < lengths[path] <= item.frame:
        fix = "count frames from 0, in the video that was labelled"
        faults.note("labels of frames that a video does not have", f"{split}: {item.name}", fix)


def _check_captures(split: str, item: Item, faults: Faults) -> None:
    """Refuse captures of one place that have different sizes."""
    if len(item.files) < 2:
        return
    stored = [headers.read(path) for path in item.files]
    sizes = {(each.height, each.width) for each in stored if each}
    if len(sizes) > 1:
        fix = "give captures of the same place with the same settings"
        faults.note("captures of different sizes", f"{split}: {item.name}", fix)


def _check_files(item: Item, faults: Faults) -> None:
    """Refuse what is broken at first sight: training would read it late, perhaps at its end."""
    if item.packed or item.frame is not None:
        return
    for path in item.files:
        if path.suffix.lower() in images.SUFFIXES:
            try:
                images.check(path)
            except EngineworksError as error:
                faults.note(_UNREADABLE, error.message, _UNREADABLE_FIX)


def _read(split: str, item: Item, faults: Faults) -> tuple[int, int] | None:
    """(height, width) of a decoded picture that its boxes lie in; None: it cannot be read."""
    try:
        height, width = item.read().shape[:2]
    except EngineworksError as error:
        faults.note(_UNREADABLE, f"{split}: {error.message}", _UNREADABLE_FIX)
        return None
    for name, (x1, y1, x2, y2) in item.boxes:
        if x1 >= width or y1 >= height or x2 > width + 1 or y2 > height + 1:
            text = f"{split}: {item.name}: {name} [{x1:g}, {y1:g}, {x2:g}, {y2:g}]"
            faults.note("boxes outside of their picture", text, "correct or remove them")
    return height, width


def _check_classes(labelled: Labelled, notes: Tally) -> None:
    """Say which metrics will lack something to be computed of."""
    shown = {split: _classes(items) for split, items in labelled.splits.items()}
    for split, classes in shown.items():
        for name in sorted(set(shown.get("train", ())) - set(classes)):
            notes.add(f"classes that {split} does not show", name)
        if split != "train" and set(classes) == {NORMAL} == set(shown.get("train", {NORMAL})):
            notes.add("splits without a defect", split)
    alike: dict[str, set[str]] = defaultdict(set)
    for name in {name for classes in shown.values() for name in classes}:
        alike[name.strip().casefold()].add(name)
    for names in alike.values():
        if len(names) > 1:
            notes.add("classes that differ in case or spaces alone", " = ".join(sorted(names)))


def _classes(items: Sequence[Item]) -> Counter[str]:
    classes = Counter(item.label for item in items if item.label)
    classes.update(name for item in items for name, _ in item.boxes)
    return classes


def _content(item: Item) -> str:
    """What two items have in common that show the same: a hash of their bytes."""
    digest = hashlib.sha256(str(item.frame).encode())
    for path in item.files:
        with path.open("rb") as file:
            if item.packed:
                continue
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if item.packed:
        with item.packed.file.open("rb") as file:
            file.seek(item.packed.start)
            digest.update(file.read(item.packed.stop - item.packed.start))
    return digest.hexdigest()


def _check_alike(alike: Sequence[tuple[str, Item]], found: Survey) -> None:
    """One picture in several places: of one label in one split, or else something is doubtful."""
    if len(alike) < 2:
        return
    names = " = ".join(f"{split}: {item.name}" for split, item in alike[:3])
    splits = {split for split, _ in alike}
    if len({item.label for _, item in alike}) > 1:
        found.faults.note("pictures with two labels", names, "keep each picture under one label")
    elif len(splits) > 1:
        found.notes.add(f"the same pictures in {' and '.join(sorted(splits))}", names)
    else:
        found.notes.add(f"the same pictures twice in {splits.pop()}", names)


def _row(split: str, items: Sequence[Item], sizes: Counter[tuple[int, int]]) -> tuple[str, ...]:
    num_boxes = sum(len(item.boxes) for item in items)
    bare = sum(not item.boxes for item in items)
    has_boxes = any(item.boxes for item in items)
    return (
        split,
        str(len(items)),
        _range(sizes),
        _counts(_classes(items)),
        f"{num_boxes}, {bare} pictures without" if has_boxes else "",
        str(sum(item.mask is not None for item in items) or ""),
    )


def _range(sizes: Counter[tuple[int, int]]) -> str:
    if not sizes:
        return ""
    low, high = (choose(sizes, key=lambda size: size[0] * size[1]) for choose in (min, max))
    small, large = (f"{width} x {height}" for height, width in (low, high))
    return small if len(sizes) == 1 else f"{small} to {large}"


def _counts(classes: Counter[str]) -> str:
    parts = [f"{name} {num}" for name, num in sorted(classes.items())]
    if len(parts) <= _MAX_CLASSES:
        return ", ".join(parts)
    fewest, most = min(classes.values()), max(classes.values())
    each = f"{fewest} each" if fewest == most else f"{fewest} to {most}"
    return f"{len(parts)} of {each}: {', '.join(sorted(classes)[: _MAX_CLASSES - 1])}, ..."


# --- the page ------------------------------------------------------------------------------------


def page(title: str, found: Survey, labelled: Labelled) -> Report:
    """Table, findings, and a few labels of each split drawn into their pictures."""
    report = Report(title).table("Splits", HEADER, found.rows)
    for heading, tally in findings(found).items():
        report.heading(heading).points(lines(tally))
    if found.faults:
        report.warning("; ".join(dict.fromkeys(found.faults.fixes.values())))
    for split, items in labelled.splits.items():
        chosen = _chosen(items)
        report.heading(f"{split}: {len(chosen)} of {len(items)}")
        for item in chosen:
            try:
                picture = drawn(item)
            except EngineworksError as error:
                report.warning(error.message)
                continue
            caption = f"{item.label}: {item.name}" if item.label else item.name
            report.figure(caption, draw.thumbnail(picture, _SIDE), photo=True)
    return report


def findings(found: Survey) -> Mapping[str, Tally]:
    """Heading -> what was found, in the order of weight; only what is not empty."""
    parts = {
        "To be mended": found.faults,
        "To be known": found.notes,
        "Left out": found.left_out,
    }
    return {heading: tally for heading, tally in parts.items() if tally}


def lines(tally: Tally) -> list[str]:
    """A line per kind."""
    kinds = []
    for kind, names in tally.names.items():
        one = Tally()
        one.names[kind] = names
        kinds.append(one.describe())
    return kinds


def drawn(item: Item) -> Array:
    """(H, W, 3) uint8: the picture with its mask's outline and its boxes."""
    picture = item.read()
    if item.mask is not None:
        height, width = picture.shape[:2]
        picture = draw.contour(picture, masks.read(item.mask, (height, width)))
    return draw.boxes(picture, [draw.Box(box, name, name) for name, box in item.boxes])


def _chosen(items: Sequence[Item]) -> list[Item]:
    """A few items: of every label one, and of those with most to see, spread over the split."""
    by_label: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_label[item.label].append(item)
    turns = [
        (turn, label, item)
        for label, its in by_label.items()
        for turn, item in enumerate(_spread(its, _MAX_FIGURES))
    ]
    first = sorted(turns, key=lambda each: each[:2])[:_MAX_FIGURES]
    return [item for _, _, item in sorted(first, key=lambda each: each[1])]


def _spread(items: Sequence[Item], num: int) -> list[Item]:
    shown = [item for item in items if item.boxes or item.mask] or list(items)
    num = min(num, len(shown))
    return [shown[i * len(shown) // num] for i in range(num)]
