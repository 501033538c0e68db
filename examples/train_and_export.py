"""From labelled pictures to a bundle whose INT8 graphs were judged, without the command line.

    python examples/train_and_export.py OUT

The pictures are drawn, and the backbone gets random weights, so that nothing is downloaded. On your
own pictures give their folder as data, and leave ``overrides`` out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from engineworks import (
    ExportConfig,
    NoisingSystem,
    export_bundle,
    load_config,
    open_bundle,
    testing,
    train,
)


def train_and_export(out: Path) -> dict[str, float]:
    """Write data, run and bundle below ``out``; returns the metrics of what ships."""
    data = testing.write_parts(out / "data", num_train=16, num_good=8, num_defective=8)
    overrides = ("backbone.weights=none", "backbone.stages=[1]", "preprocess.size=[64, 64]")
    run = train(load_config("noising", overrides=overrides), data, out / "run")
    config = ExportConfig(
        int8=True, samples=data / "train", num_samples=8, evaluation=data, seconds=1.0
    )
    bundle = export_bundle(run.root, out / "bundle", config, say=print)
    with open_bundle(bundle.root, NoisingSystem) as system:
        print(system.precision, "ships")
        return dict(system.evaluate(data).metrics)


if __name__ == "__main__":
    (folder,) = map(Path, sys.argv[1:])
    print(train_and_export(folder))
