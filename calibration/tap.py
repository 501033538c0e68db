"""An engine that lets calibration see what a system feeds it; systems need no code for that."""

from __future__ import annotations

from collections.abc import Mapping

from engineworks.calibration.observe import ChannelMean, Histogram, Observer
from engineworks.runtime.errors import EngineError
from engineworks.runtime.tensors import Array, Feeds, TensorSpec


class Tap:
    """Stands where a graph's engine stands, and shows an ``Observer`` all that passes.

    See ``runtime.engines.Engine``. Host arrays only.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer: Observer | None = observer
        engine = observer.engine
        self.backend = engine.backend
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = {
            name: engine.outputs[name] for name in observer.outputs
        }
        self.histograms: Mapping[str, Histogram] = observer.histograms
        self.means: Mapping[str, ChannelMean] = observer.means

    def run(self, feeds: Feeds, *, stream: int | None = None) -> dict[str, Array]:
        """Observe the feeds; the graph's own outputs.

        Raises:
            InputError, EngineError, CalibrationError: see ``Observer.observe``.
        """
        if self._observer is None:
            raise EngineError("this engine is closed", fix="open it again")
        if stream is not None:
            raise EngineError("calibration runs on the CPU: it takes no CUDA stream")
        return self._observer.observe(feeds)

    def close(self) -> None:
        if self._observer is not None:
            self._observer.engine.close()
            self._observer = None
