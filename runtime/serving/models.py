"""A bundle that answers from any thread, and is exchanged for another one while it does."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from engineworks.runtime.doubtful import Doubtful
from engineworks.runtime.errors import BusyError, EngineworksError, InputError, UsageError
from engineworks.runtime.serving.tensors import Tensor, answers, blank, inputs, outputs, pictures
from engineworks.runtime.sinks import Item
from engineworks.runtime.systems import Result, System
from engineworks.runtime.tensors import Array

Open = Callable[[Path], System]

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_REQUESTS = Counter("engineworks_requests", "Requests by their outcome.", ["model", "outcome"])
_PICTURES = Counter("engineworks_pictures", "Pictures that were answered.", ["model"])
_SECONDS = Histogram("engineworks_request_seconds", "From request to answer.", ["model"])
_RUNNING = Gauge("engineworks_requests_running", "Requests that run or wait.", ["model"])
_SWAPS = Counter("engineworks_swaps", "Bundles taken in the place of others.", ["model", "outcome"])
_BUNDLE = Gauge(
    "engineworks_bundle",
    "1 for the bundle that answers.",
    ["model", "system", "digest", "backend", "precision"],
)


@dataclass
class _Opened:
    """A warm system, and how many requests are at work on it."""

    system: System
    outputs: tuple[Tensor, ...]
    kept: Doubtful | None = None
    num_requests: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def digest(self) -> str:
        return self.system.bundle.manifest.digest

    def close(self) -> None:
        """Release the system, and leave the folder of doubtful pictures as it is to be."""
        if self.kept is not None:
            self.kept.__exit__()
        self.system.close()

    @property
    def labels(self) -> tuple[str, str, str, str]:
        system = self.system
        return (system.bundle.manifest.system, self.digest, system.backend, system.precision)


class Model:
    """A bundle under a name.

    Attributes:
        name: letters, digits, dots and dashes: it is part of addresses.
        folder: of the bundle; what lies there when ``swap`` is called is what answers then.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        open_bundle: Open,
        *,
        max_requests: int = 64,
        max_pictures: int = 64,
        keep: tuple[Path, int] | None = None,
    ) -> None:
        """Verify, open and warm the bundle.

        Args:
            open_bundle: verifies and opens; it may also tell the system what to look for.
            max_requests: that run or wait at a time; others are refused.
            max_pictures: that a request may bring.
            keep: folder for doubtful pictures, and how many bytes they may take; None keeps none.

        Raises:
            UsageError: a name that is no part of an address.
            BundleError and others: see ``runtime.systems.open_bundle``.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"'{name}' is no name for a model",
                fix="name it by letters, digits, dots and dashes: NAME=BUNDLE",
            )
        self.name = name
        self.folder = folder
        self._open_bundle = open_bundle
        self._max_requests = max_requests
        self._max_pictures = max_pictures
        self._keep = keep
        self._keeping = threading.Lock()
        self._lock = threading.Lock()
        self._swapping = threading.Lock()
        self._num_requests = 0
        self._opened = self._open()
        _BUNDLE.labels(name, *self._opened.labels).set(1)

    @property
    def digest(self) -> str:
        """Of the bundle that answers."""
        return self._opened.digest

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return inputs(self._opened.system.reader)

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        return self._opened.outputs

    def describe(self) -> str:
        """What answers, in one line."""
        name, digest, backend, precision = self._opened.labels
        return f"{self.name}: {name}, {backend}, {precision}, {digest[:12]}"

    def admit(self) -> None:
        """Count a request that will be answered by ``infer``.

        Raises:
            BusyError: as many run or wait as may.
        """
        with self._lock:
            if self._num_requests >= self._max_requests:
                _REQUESTS.labels(self.name, "busy").inc()
                raise BusyError(
                    f"{self._num_requests} requests of '{self.name}' run or wait",
                    fix="try again later, or let more of them wait: --max-requests",
                )
            self._num_requests += 1
        _RUNNING.labels(self.name).inc()

    def infer(
        self, feeds: Mapping[str, Array], wanted: Sequence[str] = ()
    ) -> tuple[dict[str, Array], str]:
        """Answer a request that was admitted.

        Args:
            feeds: see ``tensors.pictures``.
            wanted: names of outputs; none are all.

        Returns:
            Outputs by name, and the digest of the bundle that answered.

        Raises:
            InputError: no such input or output, or pictures that the system refuses.
            EngineworksError: see ``System.infer``.
        """
        begin, outcome = time.perf_counter(), "failed"
        try:
            with self._leased() as opened:
                known = [tensor.name for tensor in opened.outputs]
                if unknown := [name for name in wanted if name not in known]:
                    raise InputError(
                        f"there is no output '{unknown[0]}'", fix=f"ask for {', '.join(known)}"
                    )
                images = pictures(opened.system.reader, feeds, max_pictures=self._max_pictures)
                results = opened.system.infer(images)
                made = answers(results)
                self._keep_doubtful(opened, images, results)
            _PICTURES.labels(self.name).inc(len(images))
            outcome = "ok"
            return {name: made[name] for name in wanted or known}, opened.digest
        except InputError:
            outcome = "refused"
            raise
        finally:
            with self._lock:
                self._num_requests -= 1
            _RUNNING.labels(self.name).dec()
            _REQUESTS.labels(self.name, outcome).inc()
            _SECONDS.labels(self.name).observe(time.perf_counter() - begin)

    def swap(self) -> str:
        """Take what lies in the folder now in the place of what answers.

        The new bundle is verified, opened and warmed first; requests go on meanwhile. Those that
        the old one has begun it answers.

        Returns:
            The digest of the new bundle.

        Raises:
            EngineworksError: the new bundle cannot be used; the old one goes on.
        """
        with self._swapping:
            try:
                opened = self._open()
            except EngineworksError:
                _SWAPS.labels(self.name, "refused").inc()
                raise
            with self._lock:
                old, self._opened = self._opened, opened
                if not old.num_requests:
                    old.done.set()
            old.done.wait()
            old.close()
            _BUNDLE.remove(self.name, *old.labels)
            _BUNDLE.labels(self.name, *opened.labels).set(1)
            _SWAPS.labels(self.name, "done").inc()
            return opened.digest

    def close(self) -> None:
        """Release the system; requests have ended."""
        self._opened.close()

    def _keep_doubtful(
        self, opened: _Opened, images: Sequence[Array], results: Sequence[Result]
    ) -> None:
        """Keep pictures that are worth a look; where that fails, the answer is none the worse."""
        if opened.kept is None:
            return
        with self._keeping:
            try:
                for image, result in zip(images, results, strict=True):
                    opened.kept.add(Item(self.name, image), result=result, image=image)
            except OSError as error:
                _log.warning("%s: a doubtful picture is not kept: %s", self.name, error)

    def _open(self) -> _Opened:
        system = self._open_bundle(self.folder)
        try:
            # a graph that fails, fails here; and what is made on the first call is made
            image = blank(system.reader, system.bundle.manifest.preprocess.size)
            (result,) = system.infer([image])
        except BaseException:
            system.close()
            raise
        opened = _Opened(system, outputs(type(result)))
        if self._keep is not None:
            opened.kept = Doubtful(system, *self._keep).__enter__()
        return opened

    @contextmanager
    def _leased(self) -> Iterator[_Opened]:
        """What answers now; it stays open until the block has ended."""
        with self._lock:
            opened = self._opened
            opened.num_requests += 1
        try:
            yield opened
        finally:
            with self._lock:
                opened.num_requests -= 1
                if opened is not self._opened and not opened.num_requests:
                    opened.done.set()


def metadata(model: Model) -> dict[str, Any]:
    """What the protocol tells of a model; its version is the digest of its bundle."""
    return {
        "name": model.name,
        "versions": [model.digest],
        "platform": "engineworks",
        "inputs": [tensor.to_json() for tensor in model.inputs],
        "outputs": [tensor.to_json() for tensor in model.outputs],
    }
