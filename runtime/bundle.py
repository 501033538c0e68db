"""The bundle: the folder on disk that carries a trained system to where it runs.

This module owns the format; ``docs/bundle-format.md`` states it as promises. ``read`` checks
everything (schema, digest, names, sizes, SHA-256) before any other code opens a file of it;
``write`` builds the folder beside its destination and exchanges them, so a reader never sees half:
the old bundle or the new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NoReturn, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from engineworks.runtime.borders import HeldOut, border
from engineworks.runtime.claims import claim, real
from engineworks.runtime.errors import BundleError, InputError
from engineworks.runtime.evaluation import Decisions
from engineworks.runtime.files import NewFolder, is_temporary, recover
from engineworks.runtime.files import write as write_file
from engineworks.runtime.preprocess import PlanesSpec, PreprocessSpec
from engineworks.runtime.tensors import TensorSpec
from engineworks.runtime.usual import Usual

FORMAT = "engineworks-bundle"
SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "signature.json"  # not of the manifest: see runtime.signing
_CHUNK_BYTES = 1 << 20
_MAX_FILE_BYTES = 1 << 40

Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000)]
# what is read of the parts that are there to inform people: of a verdict, of a comparison of
# tensors (whose stage, graph and output lead to its measures), of the origin of a plan
_Comparisons: TypeAlias = dict[str, dict[str, dict[str, dict[str, FiniteFloat]]]]
_COMPARISONS = ("parity", "parity_half", "parity_int8")
_RULES: TypeAdapter[Any] = TypeAdapter(dict[Literal["op_types", "patterns", "nodes"], list[str]])
_DECISIONS: TypeAdapter[Any] = TypeAdapter(dict[str, list[Decisions]])
_PLANS: TypeAdapter[Any] = TypeAdapter(dict[str, dict[str, dict[str, Any]]])
_MAX_READS, _READ_AGAIN_S = 50, 0.01  # of a bundle that is replaced while it is read
_WAIT_S = 10.0  # for another change of thresholds


class _Part(BaseModel):
    # by default a NaN in a report would silently become null
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants"
    )


class FileEntry(_Part):
    """What a file of the bundle must be, byte for byte."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0, le=_MAX_FILE_BYTES)


class GraphEntry(_Part):
    """One net of the system: its tensors, and a file per variant.

    ``variants`` maps a variant name to a file: ``float`` (ONNX, float32), ``int8`` (ONNX, canonical
    Q/DQ: int8, zero point 0), ``int8-u8`` (the same numbers with unsigned activations, for x86),
    ``int8-ort`` (8 bits before each SiLU as well, for ONNX Runtime; where there is a SiLU),
    ``int8-openvino`` (one range for all that is joined, for OpenVINO; where there is a Concat).
    ``keep_float`` is the recipe's rule for nodes that quantisation leaves alone, as
    ``export.quantize.KeepFloat`` reads it: it travels along, because INT8 graphs may be made on a
    machine without torch.
    """

    inputs: dict[Name, TensorSpec]
    outputs: dict[Name, TensorSpec]
    variants: dict[Name, str]
    keep_float: dict[str, Any] = {}

    @field_validator("keep_float")
    @classmethod
    def _readable_rules(cls, rules: dict[str, Any]) -> dict[str, Any]:
        for pattern in _RULES.validate_python(rules).get("patterns", []):
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return rules


class Threshold(_Part):
    """A decision border on a score: at or above it, the answer is yes.

    ``source`` says where it came from, e.g. ``false-reject budget 0.01 on 209 training images``;
    ``held_out`` keeps the scores behind it, where there are any, so that another budget needs no
    pictures.
    """

    value: FiniteFloat
    source: str
    # left out where there is none: bundles without it keep their digest
    held_out: HeldOut | None = Field(default=None, exclude_if=lambda value: value is None)


class _Verdict(_Part):
    """What is read of the verdict of an export; there may be more."""

    model_config = ConfigDict(extra="allow")

    ship: str
    reasons: list[str] = []
    warnings: list[str] = []
    unjudged: bool = False


class _Gate(_Part):
    """What is read of the gate of an export; there may be more."""

    model_config = ConfigDict(extra="allow")

    decisions: dict[str, list[Decisions]] = {}


class Manifest(_Part):
    """Everything that a reader must know before it opens any other file of the bundle."""

    format: Literal["engineworks-bundle"] = "engineworks-bundle"
    schema_version: Literal[1] = 1
    system: Name
    graphs: dict[Name, GraphEntry]
    preprocess: PreprocessSpec | PlanesSpec
    labels: tuple[str, ...] = ()
    thresholds: dict[Name, Threshold] = {}
    params: dict[str, Any] = {}
    assets: dict[Name, str] = {}
    gate: dict[Name, float] = {}
    provenance: dict[str, Any] = {}
    reports: dict[str, Any] = {}
    files: dict[str, FileEntry] = {}
    digest: str = ""

    @field_validator("reports")
    @classmethod
    def _readable_reports(cls, reports: dict[str, Any]) -> dict[str, Any]:
        if "verdict" in reports:
            _Verdict.model_validate(reports["verdict"])
        _Gate.model_validate(reports.get("gate", {}))
        Usual.in_reports(reports)
        gate = reports.get("gate") or {}
        TypeAdapter(dict[str, Any]).validate_python(gate)
        _DECISIONS.validate_python(gate.get("decisions", {}))
        for name in _COMPARISONS:
            TypeAdapter(_Comparisons).validate_python(reports.get(name, {}))
        return reports

    @field_validator("provenance")
    @classmethod
    def _readable_provenance(cls, provenance: dict[str, Any]) -> dict[str, Any]:
        _PLANS.validate_python(provenance.get("plans", {}))
        return provenance

    def canonical_json(self) -> bytes:
        """The manifest without its digest, in the one spelling that the digest is taken of.

        Raises:
            BundleError: a number that is not finite, which JSON cannot hold.
        """
        content = self.model_dump(mode="json", exclude={"digest"})
        try:
            text = json.dumps(
                content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
            )
        except ValueError as error:
            raise BundleError("the manifest holds a number that is not finite") from error
        return text.encode()

    def sealed(self) -> Manifest:
        """The same manifest with its digest filled in."""
        return self.model_copy(update={"digest": hashlib.sha256(self.canonical_json()).hexdigest()})


AnyParams = TypeVar("AnyParams", bound=BaseModel)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its folder and its manifest."""

    root: Path
    manifest: Manifest

    def path(self, name: str) -> Path:
        """Full path of a file that the manifest lists.

        Raises:
            BundleError: the manifest lists no such file.
        """
        if name not in self.manifest.files:
            raise BundleError(f"bundle {self.root} has no file '{name}'")
        return self.root / PurePosixPath(name)

    def content(self, name: str) -> bytes:
        """The bytes of a file, verified as they are read: nobody can have exchanged it since.

        Raises:
            BundleError: no such file, or not the one of the manifest any more.
        """
        path = self.path(name)
        entry = self.manifest.files[name]
        _check_plain(path)
        with path.open("rb") as file:
            data = file.read(entry.size_bytes + 1)
        if len(data) != entry.size_bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(
                f"{path} was changed after the bundle was checked",
                fix="copy or export the bundle again",
            )
        return data

    def asset(self, role: str) -> Path:
        """Path of the file that plays ``role`` (e.g. ``bank``).

        Raises:
            BundleError: the bundle has no such asset.
        """
        if role not in self.manifest.assets:
            raise BundleError(
                f"bundle {self.root} has no '{role}'",
                fix="export it again with this version of engineworks",
            )
        return self.path(self.manifest.assets[role])

    def asset_content(self, role: str) -> bytes:
        """The bytes of the file that plays ``role``; see ``asset`` and ``content``."""
        return self.content(self.asset(role).relative_to(self.root).as_posix())

    def params(self, schema: type[AnyParams]) -> AnyParams:
        """The system's parameters.

        Raises:
            BundleError: they are not what ``schema`` takes: of another version, or another kind.
        """
        try:
            # through JSON: a tuple came back from the manifest as a list
            return schema.model_validate_json(json.dumps(self.manifest.params))
        except ValidationError as error:
            raise BundleError(
                f"the parameters of bundle {self.root} are not those of '{self.manifest.system}': "
                f"{error.errors()[0]['msg']}",
                fix="export the bundle again",
            ) from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes as lower-case hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _check_name(root: Path, name: str) -> None:
    parts = name.split("/")
    safe = all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", part) for part in parts)
    if not safe or parts[0] in (MANIFEST_NAME, SIGNATURE_NAME):
        raise BundleError(
            f"bundle {root} lists the file name {name!r}, which is not a plain relative path",
            fix="do not use this bundle: it was not written by engineworks",
        )


def load_manifest(root: Path) -> Manifest:
    """Read and check ``manifest.json`` alone: schema, digest, names; opens no other file.

    Raises:
        BundleError: missing or a link, not JSON, another schema version, unknown or ill-typed
            fields, any changed byte, or a listed path that leaves the folder.
    """
    path = root / MANIFEST_NAME
    if not path.is_file():
        raise BundleError(
            f"{root} is no bundle: it has no {MANIFEST_NAME}",
            fix="give the folder that `cli.py export ... --out` wrote",
        )
    _check_plain(path)
    return _checked(root, path.read_bytes())


def _checked(root: Path, data: bytes) -> Manifest:
    """The manifest that a text holds; see ``load_manifest``."""
    path = root / MANIFEST_NAME
    try:
        content = json.loads(data, parse_constant=_refuse_constant)
    # no UTF-8, no JSON, NaN and Infinity, which are not JSON, or brackets without an end
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{path} is not valid JSON ({error})", fix="export or copy the bundle again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BundleError(f"{path} is not the manifest of an engineworks bundle")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"bundle {root} has schema version {content.get('schema_version')!r}, "
            f"this engineworks reads version {SCHEMA_VERSION}",
            fix="export it again, or install the engineworks that wrote it",
        )
    try:
        manifest = Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{path} does not follow the bundle format: {where}: {first['msg']}",
            fix="export the bundle again",
        ) from error
    # the text as well: no byte may change, not even one that means nothing in JSON
    if manifest.sealed().digest != manifest.digest or data != _manifest_text(manifest).encode():
        raise BundleError(
            f"{path} was changed after it was written: its digest does not fit",
            fix="export or copy the bundle again; move thresholds with "
            "`cli.py bundle set-threshold`",
        )
    for name in manifest.files:
        _check_name(root, name)
    listed = [v for g in manifest.graphs.values() for v in g.variants.values()]
    for name in [*listed, *manifest.assets.values()]:
        if name not in manifest.files:
            raise BundleError(f"{path} refers to '{name}' but does not list that file")
    return manifest


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_plain(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        raise BundleError(
            f"{path} is a link or no plain file; a bundle holds plain files only",
            fix="copy the bundle again, following links",
        )


def _present(root: Path) -> set[str]:
    """The files in a bundle's folder, links included; not its manifest, nor one being replaced,
    nor its signature.
    """
    return {
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if (path.is_symlink() or not path.is_dir())
        and not (path.parent == root and is_temporary(path.name))
    } - {MANIFEST_NAME, SIGNATURE_NAME}


def verify(root: Path, manifest: Manifest) -> None:
    """Check that the folder holds exactly the files of the manifest, with their hashes.

    Raises:
        BundleError: a file is missing, extra, no plain file, of another size or another SHA-256.
    """
    present = _present(root)
    missing, extra = sorted(set(manifest.files) - present), sorted(present - set(manifest.files))
    if missing or extra:
        raise BundleError(
            f"bundle {root} does not hold the files of its manifest: "
            f"missing {missing}, extra {extra}",
            fix="copy the whole folder again, and keep other files out of it",
        )
    for name, entry in manifest.files.items():
        path = root / PurePosixPath(name)
        _check_plain(path)
        size = path.stat().st_size
        if size != entry.size_bytes:
            raise BundleError(
                f"{path} has {size} bytes, the manifest says {entry.size_bytes}",
                fix="copy or export the bundle again",
            )
        if sha256_file(path) != entry.sha256:
            raise BundleError(
                f"{path} is corrupt: its SHA-256 is not that of the manifest",
                fix="copy or export the bundle again",
            )


def read(root: Path) -> Bundle:
    """Open a bundle after checking all of it; one that is replaced meanwhile is read again.

    Raises:
        BundleError: see ``load_manifest`` and ``verify``.
    """
    for attempt in range(_MAX_READS):
        before = _identity(root)
        try:
            manifest = load_manifest(root)
            verify(root, manifest)
            break
        except (BundleError, OSError):
            replaced = recover(root) or before != _identity(root)
            if not replaced or attempt == _MAX_READS - 1:
                raise
            time.sleep(_READ_AGAIN_S)
    return Bundle(root=root, manifest=manifest)


def _identity(root: Path) -> tuple[int, int] | None:
    """What differs between a folder and the one that takes its place."""
    try:
        state = root.stat()
    except OSError:
        return None
    return state.st_ino, state.st_ctime_ns


def check_out(out: Path, *, replace: bool) -> None:
    """Refuse a destination that ``write`` would refuse; to be asked before long work.

    Raises:
        BundleError: ``out`` exists, and is no bundle, holds files that are not the bundle's, or may
            not be replaced.
    """
    if not out.exists():
        return
    if not (out / MANIFEST_NAME).is_file():
        raise BundleError(f"{out} already exists and is no bundle", fix="choose another --out")
    if not replace:
        raise BundleError(
            f"{out} already exists", fix="choose another --out, or pass --exist-ok to replace it"
        )
    if foreign := sorted(_present(out) - _listed(out)):
        raise BundleError(
            f"{out} holds files that are not the bundle's and would be lost: {foreign}",
            fix="move them out of it, or choose another --out",
        )


def _listed(root: Path) -> set[str]:
    """The files that a manifest lists, which need not be whole."""
    try:
        return set(json.loads((root / MANIFEST_NAME).read_bytes())["files"])
    except (ValueError, RecursionError, LookupError, TypeError):
        return set()


def write(
    out: Path, manifest: Manifest, files: Mapping[str, Path], *, replace: bool = False
) -> Bundle:
    """Write a bundle atomically: all files are copied, hashed and synced before it appears.

    When it fails, nothing is left over, and a bundle that was to be replaced is still there.

    Args:
        out: the folder to make.
        manifest: everything but ``files`` and ``digest``, which are filled in here.
        files: name in the bundle -> file to copy; may lie in the bundle that is replaced.
        replace: put it in the place of a bundle that is already there; never of another folder.

    Raises:
        BundleError: ``out`` exists and may not be replaced, a name is not a plain path, or the
            manifest refers to a file that is not given.
        InUseError: another process is writing it.
    """
    place = real(out)
    with claim(place):
        recover(place)
        check_out(out, replace=replace)
        for name in files:
            _check_name(out, name)
        with NewFolder(place.parent) as folder:
            entries = {}
            for name, source in sorted(files.items()):
                copied = folder.copy(name, source)
                size = copied.stat().st_size
                entries[name] = FileEntry(sha256=sha256_file(copied), size_bytes=size)
            sealed = manifest.model_copy(update={"files": entries}).sealed()
            text = _manifest_text(sealed)
            written = _checked(out, text.encode())
            folder.write(MANIFEST_NAME, text)
            check_out(out, replace=replace)  # what is there may be another's by now
            try:
                folder.place(place, replace=replace)
            except FileExistsError as error:
                raise BundleError(
                    f"{out} appeared while the bundle was made, and is left alone",
                    fix="choose another --out",
                ) from error
    return Bundle(root=out, manifest=written)


def set_threshold(bundle: Bundle, name: str, value: float) -> Bundle:
    """Move a decision border without exporting again; only ``manifest.json`` changes.

    Raises:
        BundleError: the bundle has no threshold of that name.
        InputError: the value is not finite.
        InUseError: another process is writing the bundle.
    """
    if not math.isfinite(value):
        raise InputError(f"a threshold cannot be {value}", fix="give a finite number")
    return _moved(bundle, name, lambda _held_out: (value, "set by hand"))


def set_budget(bundle: Bundle, name: str, budget: float) -> Bundle:
    """The same, to where a share of good pictures is expected above; see ``runtime.borders``.

    Raises:
        BundleError: no threshold of that name, or one without scores of held-out pictures.
        InputError: a budget outside of (0, 1).
        InUseError: another process is writing the bundle.
    """

    def of(held_out: HeldOut | None) -> tuple[float, str]:
        if held_out is None:
            raise BundleError(
                f"bundle {bundle.root} keeps no scores behind the threshold '{name}'",
                fix="give a number, or train and export again with this engineworks",
            )
        source = f"false-reject budget {budget:g} on {held_out.count} held-out pictures"
        return border(held_out, budget), source

    return _moved(bundle, name, of)


def _moved(bundle: Bundle, name: str, to: Callable[[HeldOut | None], tuple[float, str]]) -> Bundle:
    """Puts a threshold where ``to`` says, with its source; the scores behind it stay."""
    with claim(bundle.root, wait_s=_WAIT_S):
        # as it is now: another process may have moved another threshold
        manifest = load_manifest(bundle.root)
        thresholds = manifest.thresholds
        if name not in thresholds:
            raise BundleError(
                f"bundle {bundle.root} has no threshold '{name}'",
                fix=f"choose one of {', '.join(sorted(thresholds)) or '(it has none)'}",
            )
        held_out = thresholds[name].held_out
        value, source = to(held_out)
        moved = {**thresholds, name: Threshold(value=value, source=source, held_out=held_out)}
        manifest = manifest.model_copy(update={"thresholds": moved}).sealed()
        write_file(bundle.root / MANIFEST_NAME, _manifest_text(manifest))
    return Bundle(root=bundle.root, manifest=manifest)


def _manifest_text(manifest: Manifest) -> str:
    return json.dumps(manifest.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"
