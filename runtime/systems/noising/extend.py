"""A bundle of ``noising`` whose bank also knows new normal images."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from engineworks.runtime import files, images
from engineworks.runtime.bank import Bank
from engineworks.runtime.bundle import Bundle, write
from engineworks.runtime.errors import BundleError, InputError
from engineworks.runtime.preprocess import apply
from engineworks.runtime.sources import open_source
from engineworks.runtime.systems import choose, open_engines
from engineworks.runtime.systems.noising.params import Params
from engineworks.runtime.systems.noising.tiles import Layout


def extend(
    bundle: Bundle,
    folder: Path,
    out: Path,
    *,
    max_rows: int,
    backend: str = "auto",
    threads: int | None = None,
    exist_ok: bool = False,
) -> int:
    """Write a bundle whose bank also knows new normal images.

    The rows farthest from the bank are added, greedily; statistics and thresholds stay, so scores
    of old and new images remain comparable.

    Args:
        folder: normal images, read recursively.
        max_rows: at most so many rows are added.

    Returns:
        Number of rows added.

    Raises:
        InputError: no pictures, or one that cannot be read.
        BundleError: a bundle without a bank, or with one per place, or ``out`` exists.
    """
    if "bank" not in bundle.manifest.assets:
        raise BundleError(
            f"bundle {bundle.root} has no bank: a discriminator judges",
            fix="train again with the new images, or with --set judge=bank",
        )
    params = bundle.params(Params)
    layers, tiles = params.layers, params.tiles
    if layers is not None and layers.window is not None:
        raise BundleError(
            f"the bank of {bundle.root} has as many rows for each place: a window searches it",
            fix="train again with the new images",
        )
    source = open_source(str(folder))
    if source.kind != "images":
        raise InputError(f"{folder} holds no pictures", fix="give a folder of normal pictures")
    # float features: the bank must serve every precision
    backend, _ = choose(bundle, backend, "float")
    engines = open_engines(bundle, backend, "float", threads=threads)
    spec = bundle.manifest.preprocess
    old = Bank.load(bundle.asset("bank"))
    with files.scratch(out.parent) as scratch:
        # in a file: the patches of large pictures outgrow memory
        kept = scratch / "features.float32"
        with closing(engines["features"]) as engine, kept.open("wb") as file:
            for path in source.paths:
                pieces = [images.read(path)]
                if tiles is not None:
                    height, width = pieces[0].shape[:2]
                    pieces = Layout.of((height, width), spec.size, tiles).cut(pieces[0])
                for piece in pieces:
                    engine.run({"images": apply(spec, [piece])})["features"].tofile(file)
        features_ND = np.memmap(kept, np.float32, "r").reshape(-1, old.width)
        new = old.extended(features_ND, max_rows)
        path = scratch / "bank.faiss"
        new.save(path)
        content = {name: bundle.path(name) for name in bundle.manifest.files}
        content[bundle.manifest.assets["bank"]] = path
        write(out, bundle.manifest, content, replace=exist_ok)
    return len(new) - len(old)
