"""What every opened system is made of; a system adds ``infer``, ``draw`` and ``evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, ClassVar, Self, TypeVar, cast

from engineworks.runtime.bundle import Bundle
from engineworks.runtime.engines import BACKENDS, Engine
from engineworks.runtime.sources import Reader
from engineworks.runtime.systems.calls import Calls
from engineworks.runtime.tensors import Array
from engineworks.runtime.threads import available_threads

Results = TypeVar("Results", bound=Sequence[Any])
Opened = TypeVar("Opened", bound="OpenedSystem")


def in_turn(
    infer: Callable[[Opened, Sequence[Array]], Results],
) -> Callable[[Opened, Sequence[Array]], Results]:
    """Of a system's ``infer``: many threads may call it; see ``runtime.systems.calls``."""

    @wraps(infer)
    def called(self: Opened, images: Sequence[Array]) -> Results:
        return cast(Results, self.calls.run(partial(infer, self), images))

    return called


class OpenedSystem:
    """A bundle with its engines; see ``runtime.systems.System``.

    Attributes:
        threads: CPU threads; None takes all cores that this process may use.
        calls: of ``infer``, those that run and those that wait.
    """

    reader: ClassVar[Reader]

    def __init__(
        self,
        bundle: Bundle,
        engines: Mapping[str, Engine],
        *,
        backend: str,
        precision: str,
        threads: int | None = None,
        max_batch: int = 1,
        max_wait_ms: float = 0.0,
    ) -> None:
        """Take what was opened; see ``runtime.systems.open_bundle``."""
        self.bundle = bundle
        self.engines = engines
        self.backend = backend
        self.precision = precision
        self.threads = threads
        num = threads or available_threads()
        # a graph takes all of a CPU's threads, or one that waits for the GPU
        on_gpu = backend in BACKENDS and BACKENDS[backend].needs_gpu
        self.calls = Calls(
            1 if on_gpu else num,
            at_once=num if on_gpu else 1,
            max_batch=max_batch,
            max_wait_ms=max_wait_ms,
        )
        self.set_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_up(self) -> None:
        """Read from the bundle what the system needs; its engines are there already."""

    def close(self) -> None:
        """Wait for the calls that were made, then release all; closing twice is allowed."""
        self.calls.close()
        self.release()

    def release(self) -> None:
        """Release the engines; no call runs any more."""
        for engine in self.engines.values():
            engine.close()
