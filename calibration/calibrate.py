"""Measure ranges by running the deployed system: its own preprocessing, its own graphs.

One pass over the samples fills histograms; tables by any method are read off them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import onnxruntime

from engineworks import __version__
from engineworks.calibration import ranges
from engineworks.calibration.observe import ChannelMean, Histogram, Observer
from engineworks.calibration.samples import Sample
from engineworks.calibration.table import GraphRanges, Range, Table, graph_sha256, preprocess_sha256
from engineworks.calibration.tap import Tap
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.errors import CalibrationError
from engineworks.runtime.systems import Follows, open_system
from engineworks.runtime.usual import Usual, brightness, score_of

BATCH_SIZE = 4


@dataclass(frozen=True)
class Histograms:
    """What one pass saw: graph -> tensor -> histogram and channel means, and with what.

    Attributes:
        usual: what the samples are like.
    """

    bundle: Bundle
    samples: tuple[Sample, ...]
    graphs: Mapping[str, Mapping[str, Histogram]]
    means: Mapping[str, Mapping[str, ChannelMean]]
    usual: Usual

    def table(self, method: str, *, percentile: float = ranges.DEFAULT_PERCENTILE) -> Table:
        """Ranges by one method, with their provenance.

        Raises:
            UsageError: see ``calibration.ranges.check_method``.
        """
        ranges.check_method(method, percentile)
        return Table(
            method=method,
            percentile=percentile if method == "percentile" else None,
            graphs={
                graph: GraphRanges(
                    sha256=graph_sha256(self.bundle, graph) or "",
                    tensors={
                        name: Range(
                            amax=ranges.amax(histogram, method, percentile=percentile),
                            min=histogram.min,
                            max=histogram.max,
                            means=tuple(self.means[graph][name].mean.ravel().tolist()),
                        )
                        for name, histogram in histograms.items()
                    },
                )
                for graph, histograms in self.graphs.items()
            },
            samples={sample.name: sample.sha256 for sample in self.samples},
            preprocess=preprocess_sha256(self.bundle.manifest.preprocess),
            tools={
                "engineworks": __version__,
                "numpy": np.__version__,
                "onnxruntime": onnxruntime.__version__,
            },
        )


def measure(
    bundle: Bundle,
    samples: Sequence[Sample],
    tensors: Mapping[str, Sequence[str]],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Histograms:
    """Show the samples to the float system, a small batch at a time, and count what passes.

    Memory does not depend on the number of samples.

    Args:
        bundle: with float graphs.
        samples: at least one.
        tensors: graph name -> names of the tensors that need ranges.
        threads: None takes all cores that this process may use.
        progress: called with (samples done, samples in all).

    Raises:
        CalibrationError: no samples, an unknown graph or tensor, a tensor with NaN or infinity, or
            a graph that the system never ran.
        ImageError: a sample cannot be read.
        BackendError, BundleError, EngineError: the system cannot be opened or run.
    """
    if not samples:
        raise CalibrationError("there are no samples", fix="give at least one image")
    graphs = bundle.manifest.graphs
    if unknown := sorted(set(tensors) - set(graphs)):
        raise CalibrationError(f"the bundle has no graphs {unknown}, only {sorted(graphs)}")
    taps = {
        name: Tap(
            Observer(bundle.path(graph.variants["float"]), tensors.get(name, ()), threads=threads)
        )
        for name, graph in graphs.items()
    }
    seen: list[tuple[float, float | None]] = []
    with closing(
        open_system(bundle, backend="ort", precision="float", threads=threads, engines=taps)
    ) as system:
        for start in range(0, len(samples), BATCH_SIZE):
            batch = samples[start : start + BATCH_SIZE]
            images = [system.reader.read(sample.path) for sample in batch]
            seen += [
                (brightness(image), score_of(result))
                for image, result in zip(images, system.infer(images), strict=True)
            ]
            if isinstance(system, Follows):
                system.rehearse(images)
            if progress is not None:
                progress(start + len(batch), len(samples))
    measured = {name: taps[name].histograms for name in tensors}
    for graph, histograms in measured.items():
        if any(histogram.num_values == 0 for histogram in histograms.values()):
            raise CalibrationError(
                f"the system ran no image through graph '{graph}'",
                fix="keep that graph float, or give samples that reach it",
            )
    means = {name: taps[name].means for name in tensors}
    return Histograms(bundle, tuple(samples), measured, means, Usual.of(seen))


def calibrate(
    bundle: Bundle,
    samples: Sequence[Sample],
    tensors: Mapping[str, Sequence[str]],
    *,
    method: str = "minmax",
    percentile: float = ranges.DEFAULT_PERCENTILE,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Table:
    """Measure, and read the ranges off by one method: see ``measure`` and ``Histograms.table``."""
    ranges.check_method(method, percentile)
    return measure(bundle, samples, tensors, threads=threads, progress=progress).table(
        method, percentile=percentile
    )
