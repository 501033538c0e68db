"""What every opened system is made of; a system adds ``infer``, ``draw`` and ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from engineworks.runtime.bundle import Bundle
from engineworks.runtime.engines import Engine
from engineworks.runtime.sources import Reader


class OpenedSystem:
    """A bundle with its engines; see ``runtime.systems.System``.

    Attributes:
        threads: CPU threads; None takes all cores that this process may use.
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
    ) -> None:
        self.bundle = bundle
        self.engines = engines
        self.backend = backend
        self.precision = precision
        self.threads = threads
        self.set_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_up(self) -> None:
        """Read from the bundle what the system needs; its engines are there already."""

    def close(self) -> None:
        """Release the engines; closing twice is allowed."""
        for engine in self.engines.values():
            engine.close()
