"""A bundle of ``noising`` whose bank also knows new normal images."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from runtime import files, images
from runtime.bank import Bank
from runtime.bundle import Bundle, write
from runtime.errors import BundleError, InputError
from runtime.preprocess import apply
from runtime.sources import open_source
from runtime.systems import choose, open_engines
from runtime.systems.noising import DISCRIMINATE, NAME
from runtime.systems.noising.params import Params


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
        BundleError: another system's bundle, one without a bank, or ``out`` exists.
    """
    if bundle.manifest.system != NAME:
        raise BundleError(f"bundle {bundle.root} holds '{bundle.manifest.system}', not '{NAME}'")
    if DISCRIMINATE in bundle.manifest.graphs:
        raise BundleError(
            f"bundle {bundle.root} has no bank: a discriminator judges",
            fix="train again with the new images, or with --set judge=bank",
        )
    layers = bundle.params(Params).layers
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
    with closing(engines["features"]) as engine:
        features = [
            engine.run({"images": apply(spec, [images.read(path)])})["features"][0]
            for path in source.paths
        ]
    old = Bank.load(bundle.asset("bank"))
    new = old.extended(np.concatenate(features), max_rows)
    with files.scratch(out.parent) as scratch:
        path = scratch / "bank.faiss"
        new.save(path)
        content = {name: bundle.path(name) for name in bundle.manifest.files}
        content[bundle.manifest.assets["bank"]] = path
        write(out, bundle.manifest, content, replace=exist_ok)
    return len(new) - len(old)
