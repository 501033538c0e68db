"""The systems that a bundle can hold, behind one protocol: samples in, results out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar, overload, runtime_checkable

from engineworks.runtime.bundle import Bundle, read
from engineworks.runtime.contract import CheckedEngine
from engineworks.runtime.engines import BACKENDS, Engine, check_backend, open_engine
from engineworks.runtime.errors import BackendError, BundleError, UsageError
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.graphs import check_graph
from engineworks.runtime.labels import Labelled
from engineworks.runtime.plans import PLAN_VARIANTS, check_origin
from engineworks.runtime.references import SUFFIX, Prototypes, References, read_references
from engineworks.runtime.results import Detections
from engineworks.runtime.signing import check_signature
from engineworks.runtime.sources import Reader
from engineworks.runtime.tensors import Array
from engineworks.runtime.threads import available_threads, bound_pools

PRECISIONS = ("auto", "int8", "int8-bf16", "float", "fp16", "bf16")

# name -> module with a class ``System``
SYSTEMS: dict[str, str] = {
    "backbone": "engineworks.runtime.systems.backbone",
    "noising": "engineworks.runtime.systems.noising",
    "paco": "engineworks.runtime.systems.paco",
    "refdet": "engineworks.runtime.systems.refdet",
    "stripe": "engineworks.runtime.systems.stripe",
}


class Result(Protocol):
    """What ``infer`` answers for one sample; the concrete types live in ``runtime.results``."""

    def to_json(self) -> dict[str, Any]: ...

    def summary(self) -> str:
        """The answer in one line, for people."""
        ...


class System(Protocol):
    """An opened bundle; as a context it closes itself.

    Attributes:
        bundle: what it was opened from.
        engines: graph name -> engine; replaced by tests and by calibration's ``Tap``.
        backend: what really runs, never ``auto``.
        precision: likewise.
        reader: of the class: how files become its images.
    """

    reader: ClassVar[Reader]
    bundle: Bundle
    engines: Mapping[str, Engine]
    backend: str
    precision: str

    @staticmethod
    def labelled(root: Path, /) -> Labelled:
        """All that the data set in a folder says, and what is wrong with it."""
        ...

    def infer(self, images: Sequence[Array]) -> Sequence[Result]:
        """One result per image; images are (H, W, 3) of any size, as ``reader`` gives them.

        May be called from any number of threads: calls wait for their turn, and all together take
        no more CPU threads than the system was opened with. Answers are those of one thread, bit
        for bit, unless ``open_bundle`` was asked to join calls to batches.

        Raises:
            InputError: an image of another dtype or layout, or an empty one.
            EngineError: the system is closed.
        """
        ...

    def draw(self, image: Array, result: Any) -> Array:
        """Overlay of a result on its image: (H, W', 3) uint8 RGB. Called from other threads."""
        ...

    def evaluate(
        self, data: Path, *, progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """The task's metrics, decisions and evidence on a labelled folder.

        Labels that allow no metric, such as good pictures alone, still give decisions.

        Raises:
            DatasetError: the folder does not have the layout or the labels that it takes.
        """
        ...

    def close(self) -> None:
        """Refuse further calls, let those that run or wait have their answers, release all.

        Closing twice is allowed, also from several threads.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


AnySystem = TypeVar("AnySystem", bound=System)


@runtime_checkable
class Promptable(System, Protocol):
    """A system that is told what to look for."""

    def infer(self, images: Sequence[Array]) -> Sequence[Detections]: ...

    def encode(self, references: References) -> Prototypes:
        """Turn pictures of objects into what can be looked for."""
        ...

    def prompt(self, prototypes: Prototypes) -> None:
        """Look for these objects from now on.

        Raises:
            InputError: they are of another bundle, or none.
        """
        ...

    def configure(self, *, conf: float | None = None, iou: float | None = None) -> None:
        """Change the score that an object needs, and the overlap of two objects of a name."""
        ...

    def names(self) -> tuple[str, ...]:
        """All that is looked for."""
        ...

    def feeds(self, images_BCHW: Array) -> dict[str, dict[str, Array]]:
        """What the graphs that run for every batch of images are fed; for benchmarks."""
        ...


@runtime_checkable
class Confident(Protocol):
    """Of a class ``System`` and what is opened: it learns how sure its answers may be.

    Attributes:
        confidence: of the precision that runs here; None where nobody fitted it.
    """

    confidence: Any

    def fit_confidence(self, data: Path | None) -> Bundle:
        """The bundle with a confidence of the precision that runs here, fitted on labelled data.

        What the bundle says of that precision is replaced, by nothing where there are no data, or
        none that training left for it. Files stay as they are.

        Raises:
            DatasetError: the data are not of the bundle's classes.
        """
        ...


@runtime_checkable
class ShowsReferences(Protocol):
    """A system that can show what it knows objects by."""

    def draw_references(self) -> Array | None:
        """(H, W, 3) uint8 RGB; None where it has no pictures."""
        ...


class Stream(Protocol):
    """Goes through the frames of one video in order."""

    def infer(self, images: Sequence[Array]) -> Sequence[Result]: ...


@runtime_checkable
class Follows(Protocol):
    """A system that need not search every frame of a video whole."""

    def follower(self) -> Stream | None:
        """What answers for one video in its place; None: this bundle cannot."""
        ...

    def rehearse(self, images: Sequence[Array]) -> None:
        """Run what only a video runs, on images; for calibration."""
        ...


@runtime_checkable
class BringsReferences(Protocol):
    """Of a class ``System``: its bundles bring pictures of what they look for unasked."""

    def bring_references(
        self, bundle: Bundle, pictures: Path, out: Path, *, exist_ok: bool = False
    ) -> Bundle: ...


@runtime_checkable
class Extendable(Protocol):
    """Of a class ``System``: what its bundles know can be extended by new images."""

    def extend(
        self,
        bundle: Bundle,
        folder: Path,
        out: Path,
        *,
        max_rows: int,
        backend: str = "auto",
        threads: int | None = None,
        exist_ok: bool = False,
    ) -> int: ...


def exercise(system: System, images: Sequence[Array]) -> None:
    """Run images through every graph of a system; the answers are nobody's."""
    system.infer(images)
    if isinstance(system, Follows):
        system.rehearse(images)


def prompt(
    system: System, *references: Path, conf: float | None = None, iou: float | None = None
) -> None:
    """Tell a system what to look for, and how.

    Args:
        references: a file of prototypes, or pictures as ``runtime.references.read_references``
            takes them; none leave what the bundle brings.
        conf, iou: see ``Promptable.configure``.

    Raises:
        UsageError: something is given, and the system takes nothing of the kind.
        InputError: no references there, or prototypes of another bundle.
        ImageError: a picture cannot be read.
    """
    if not references and conf is None and iou is None:
        return
    if not isinstance(system, Promptable):
        raise UsageError(
            f"the system '{system.bundle.manifest.system}' is not told what to look for",
            fix="leave out --refs, --conf and --iou",
        )
    system.configure(conf=conf, iou=iou)
    if references:
        prototypes = [path for path in references if path.suffix == SUFFIX]
        if prototypes and len(references) > 1:
            raise UsageError(
                f"{prototypes[0]} holds all that is looked for, and more is given",
                fix="give one file of `refs`, or pictures alone",
            )
        system.prompt(
            Prototypes.load(prototypes[0])
            if prototypes
            else system.encode(read_references(*references))
        )


def bring_references(
    bundle: Bundle, pictures: Path, out: Path, *, exist_ok: bool = False
) -> Bundle:
    """Write a bundle that looks for other objects where nothing else is asked for.

    Args:
        pictures: see ``runtime.references.read_references``.

    Raises:
        UsageError: its system is not told what to look for.
        InputError, ImageError: no references there, or a picture that cannot be read.
        BundleError: ``out`` exists.
    """
    name = bundle.manifest.system
    system = system_module(name).System
    if not isinstance(system, BringsReferences):
        raise UsageError(
            f"the system '{name}' is not told what to look for", fix="leave --refs out"
        )
    return system.bring_references(bundle, pictures, out, exist_ok=exist_ok)


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
    """Write a bundle whose memory bank also knows new normal images.

    Args:
        folder: normal images, read recursively.
        max_rows: at most so many rows are added.
        backend, threads: of the graph that describes the images.

    Returns:
        Number of rows added.

    Raises:
        InputError: no pictures, or one that cannot be read.
        BundleError: the system or this bundle of it has no such bank, or ``out`` exists.
    """
    name = bundle.manifest.system
    system = system_module(name).System
    if not isinstance(system, Extendable):
        raise BundleError(
            f"bundle {bundle.root} holds '{name}', a system without a memory bank",
            fix="train again with the new images",
        )
    return system.extend(
        bundle, folder, out, max_rows=max_rows, backend=backend, threads=threads, exist_ok=exist_ok
    )


def system_module(name: str) -> Any:
    """The module of a system.

    Raises:
        UsageError: there is no such system.
    """
    if name not in SYSTEMS:
        raise UsageError(f"there is no system '{name}'", fix=f"choose one of {', '.join(SYSTEMS)}")
    return importlib.import_module(SYSTEMS[name])


def reader_of(name: str) -> Reader:
    """How files become the images of a system.

    Raises:
        UsageError: there is no such system.
    """
    reader: Reader = system_module(name).System.reader
    return reader


def labelled_of(name: str) -> Callable[[Path], Labelled]:
    """How folders become the labelled data of a system; see ``runtime.labels``.

    Raises:
        UsageError: there is no such system.
    """
    labelled: Callable[[Path], Labelled] = system_module(name).System.labelled
    return labelled


def choose(bundle: Bundle, backend: str = "auto", precision: str = "auto") -> tuple[str, str]:
    """Resolve ``auto``: the precision that the bundle's verdict ships, the first usable backend.

    Returns:
        (backend, precision), neither of them ``auto``.

    Raises:
        UsageError: an unknown name.
        BackendError: the backend asked for cannot be used, or none can.
        BundleError: the bundle holds no variant for what was asked.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"there is no precision '{precision}'", fix=f"choose one of {', '.join(PRECISIONS)}"
        )
    manifest = bundle.manifest
    if precision == "auto":
        precision = str(manifest.reports.get("verdict", {}).get("ship", "float"))
    if backend != "auto":
        check_backend(backend)
        candidates = [backend]
    else:
        candidates = [name for name in BACKENDS if BACKENDS[name].why_not() is None]
        if not candidates:
            raise BackendError("no backend is installed here", fix='pip install "engineworks[cpu]"')
    for name in candidates:
        if all(variant_of(graph.variants, name, precision) for graph in manifest.graphs.values()):
            return name, precision
    raise BundleError(
        f"bundle {bundle.root} has no '{precision}' graphs for backend {' or '.join(candidates)}",
        fix=_missing_fix(bundle, backend, precision),
    )


def _missing_fix(bundle: Bundle, backend: str, precision: str) -> str:
    has_int8 = all("int8" in graph.variants for graph in bundle.manifest.graphs.values())
    if precision in ("int8", "int8-bf16") and not has_int8:
        return "export with --int8 --samples DIR"
    if backend == "tensorrt":
        return f"build it here: cli.py export {bundle.root} --out OUT --plan {precision}"
    if precision == "fp16":
        return f"write it: cli.py export {bundle.root} --out OUT --half fp16"
    return "choose another --precision or --backend"


def variant_of(variants: Mapping[str, str], backend: str, precision: str) -> str | None:
    """The best variant of a graph that a backend runs a precision from, None where none is."""
    known = BACKENDS[backend].variants.get(precision, ())
    return next((variant for variant in known if variant in variants), None)


def open_engines(
    bundle: Bundle,
    backend: str,
    precision: str,
    *,
    threads: int | None = None,
    host_code: bool = False,
) -> dict[str, Engine]:
    """Open every graph of a bundle; ``backend`` and ``precision`` as ``choose`` resolved them.

    Args:
        host_code: let plans bring program code of their own, as version-compatible ones do.

    Raises:
        BackendError, BundleError, EngineError: see ``open_engine`` and ``plans.check_origin``; or a
            graph is not the one that the manifest describes.
    """
    engines: dict[str, Engine] = {}
    for name, graph in bundle.manifest.graphs.items():
        variant = variant_of(graph.variants, backend, precision)
        if variant is None:
            raise BundleError(f"graph '{name}' has no '{precision}' variant for '{backend}'")
        if variant in PLAN_VARIANTS:
            check_origin(bundle, name, variant, host_code=host_code)
        data = bundle.content(graph.variants[variant])
        if variant not in PLAN_VARIANTS:
            check_graph(data, f"{graph.variants[variant]} of bundle {bundle.root}")
        engine = open_engine(
            data,
            backend,
            precision=precision,
            threads=threads,
            host_code=host_code and variant in PLAN_VARIANTS,
            again=partial(bundle.content, graph.variants[variant]),
        )
        engines[name] = CheckedEngine(engine, name, graph)
    return engines


def open_system(
    bundle: Bundle,
    *,
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    engines: Mapping[str, Engine] | None = None,
    host_code: bool = False,
    max_batch: int = 1,
    max_wait_ms: float = 0.0,
) -> System:
    """Open a verified bundle for inference.

    Args:
        engines: use these instead of opening the bundle's graphs (tests, calibration).
        host_code: see ``open_engines``.
        max_batch, max_wait_ms: see ``open_bundle``.

    Raises:
        UsageError, BackendError, BundleError, EngineError: see ``choose`` and ``open_engine``.
    """
    name = bundle.manifest.system
    if name not in SYSTEMS:
        raise BundleError(
            f"bundle {bundle.root} holds the system '{name}', which this engineworks does not "
            f"have: it has {', '.join(SYSTEMS)}",
            fix="install the engineworks that wrote it",
        )
    module = system_module(name)
    module.contract(bundle).check(bundle)
    backend, precision = choose(bundle, backend, precision)
    if engines is None:
        engines = open_engines(bundle, backend, precision, threads=threads, host_code=host_code)
    system: System = module.System(
        bundle,
        engines,
        backend=backend,
        precision=precision,
        threads=threads,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
    )
    bound_pools(threads or available_threads())
    return system


@overload
def open_bundle(
    path: str | Path,
    kind: type[AnySystem],
    *,
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    signers: Sequence[Path] = (),
    host_code: bool = False,
    max_batch: int = 1,
    max_wait_ms: float = 0.0,
) -> AnySystem: ...


@overload
def open_bundle(
    path: str | Path,
    kind: None = None,
    *,
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    signers: Sequence[Path] = (),
    host_code: bool = False,
    max_batch: int = 1,
    max_wait_ms: float = 0.0,
) -> System: ...


def open_bundle(
    path: str | Path,
    kind: type[System] | None = None,
    *,
    backend: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    signers: Sequence[Path] = (),
    host_code: bool = False,
    max_batch: int = 1,
    max_wait_ms: float = 0.0,
) -> System:
    """Verify a bundle and open it for inference.

    Args:
        path: the bundle's folder.
        kind: the class of the system that it must hold, which is then the type of what is
            returned, e.g. ``NoisingSystem``; None takes any.
        backend: ``auto`` takes the first that is installed; otherwise ``openvino``, ``ort``,
            ``tensorrt``, ``ort-cuda`` or ``ort-tensorrt``.
        precision: ``auto`` takes what the bundle's verdict ships; otherwise ``float``, ``int8``,
            ``int8-bf16``, ``bf16`` or ``fp16``.
        threads: CPU threads, of all calls together; None takes all cores that this process may use.
            Of several systems each takes so many, and all together no more than there are cores.
        signers: public keys; one of them must have signed the bundle where any is given.
        host_code: let TensorRT plans bring program code of their own, as version-compatible ones
            do: only plans that you built yourself.
        max_batch: images of calls that wait are joined to batches of so many. Above 1 an answer may
            differ in its last bits from that of a picture by itself, as it may in a longer list.
        max_wait_ms: how long a call waits for others that it can be joined to.

    Raises:
        BundleError: no bundle there, a changed or broken one, another system than ``kind``, not
            signed by ``signers``, or nothing in it for this backend and precision.
        UsageError: a backend or precision of an unknown name.
        BackendError: the backend asked for cannot be used, or none can.
        EngineError: a graph cannot be loaded.
    """
    bundle = read(Path(path))
    if signers:
        check_signature(bundle, signers)
    name = bundle.manifest.system
    if kind is not None and name in SYSTEMS and system_module(name).System is not kind:
        raise BundleError(
            f"bundle {bundle.root} holds the system '{name}', not '{_name_of(kind)}'",
            fix=f"open it with the class of '{name}', or with none",
        )
    return open_system(
        bundle,
        backend=backend,
        precision=precision,
        threads=threads,
        host_code=host_code,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
    )


def _name_of(kind: type[System]) -> str:
    known = [name for name, module in SYSTEMS.items() if module == kind.__module__]
    return known[0] if known else kind.__qualname__
