"""An engine made of a Python function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from engineworks.runtime.errors import EngineError
from engineworks.runtime.tensors import Array, Feeds, TensorSpec, check_feeds, check_host


@dataclass
class FunctionEngine:
    """An engine over a Python function.

    Attributes:
        function: called with the feeds; returns the outputs by name.
        inputs, outputs: specs; both directions are checked against them.
        calls: the feeds of every run so far.
    """

    function: Callable[[Mapping[str, Array]], Mapping[str, Array]]
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    backend: str = "function"
    calls: list[dict[str, Array]] = field(default_factory=list)
    closed: bool = False

    def run(self, feeds: Feeds, *, stream: int | None = None) -> dict[str, Array]:
        """See ``runtime.engines.Engine.run``.

        Raises:
            InputError: feeds, or what the function returns, do not fit the specs.
            EngineError: the engine is closed, or was given a stream or device arrays.
        """
        if self.closed:
            raise EngineError("this engine is closed", fix="open it again")
        check_host(feeds, stream, self.backend)
        check_feeds(self.inputs, feeds)
        host = {name: np.array(feed) for name, feed in feeds.items()}
        self.calls.append(host)
        answer = {name: np.array(output) for name, output in self.function(host).items()}
        check_feeds(self.outputs, answer)
        return answer

    def close(self) -> None:
        self.closed = True
