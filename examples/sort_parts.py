"""Sort pictures of parts into ``good`` and ``anomalous``, with what was found drawn on the latter.

    python examples/sort_parts.py BUNDLE PICTURES OUT

BUNDLE holds ``noising``. Needs no PyTorch.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import cv2

from engineworks import NoisingSystem, errors, open_bundle, read_image


def sort_parts(bundle: Path, pictures: Path, out: Path) -> dict[str, int]:
    """Copy each picture below ``pictures`` into ``out``; returns how many of which kind."""
    counts = {"good": 0, "anomalous": 0, "unreadable": 0}
    with open_bundle(bundle, NoisingSystem) as system:
        for file in sorted(pictures.rglob("*.png")):
            try:
                image = read_image(file)
            except errors.ImageError as error:
                print(error, file=sys.stderr)
                counts["unreadable"] += 1
                continue
            (result,) = system.infer([image])
            kind = "anomalous" if result.is_anomalous else "good"
            counts[kind] += 1
            # the highest score first in a listing that is sorted backwards
            name = f"{result.score:08.3f}-{file.parent.name}-{file.name}"
            (out / kind).mkdir(parents=True, exist_ok=True)
            if result.is_anomalous:
                overlay = system.draw(image, result)
                cv2.imwrite(str(out / kind / name), cv2.cvtColor(overlay, cv2.COLOR_RGB2BGR))
            else:
                shutil.copyfile(file, out / kind / name)
    return counts


if __name__ == "__main__":
    bundle, pictures, out = map(Path, sys.argv[1:])
    print(sort_parts(bundle, pictures, out))
