"""Options that several commands share, and what a command gets in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

if TYPE_CHECKING:
    from engineworks.runtime.bundle import Bundle
    from engineworks.runtime.systems import System

OpenBundle: TypeAlias = "Callable[..., System]"  # of a path, and of what else open_bundle takes
Prepare: TypeAlias = "Callable[[System], None]"

PATH = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
OUT = click.option("--out", type=PATH, required=True, help="Folder to write.")
EXIST_OK = click.option("--exist-ok", is_flag=True, help="Replace what --out already holds.")
BACKEND = click.option(
    "--backend",
    type=click.Choice(["auto", "ort", "openvino", "tensorrt", "ort-cuda", "ort-tensorrt"]),
    default="auto",
    show_default=True,
    help="What runs the graphs; one that is not installed is an error.",
)
PRECISION = click.option(
    "--precision",
    type=click.Choice(["auto", "int8", "int8-bf16", "float", "fp16", "bf16"]),
    default="auto",
    show_default=True,
    help="auto takes what the bundle's verdict ships.",
)
THREADS = click.option("--threads", type=click.IntRange(min=1), help="CPU threads [all cores].")
HOST_CODE = click.option(
    "--allow-host-code",
    "host_code",
    is_flag=True,
    help="Let a version-compatible plan bring program code: only one that you built yourself.",
)
SIGNED = click.option(
    "--require-signature",
    "signers",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    metavar="KEY",
    help="Refuse a bundle that this public key has not signed; of several one is enough.",
)


def there(_context: object, _option: object, paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """What is no box in a file must exist; as click calls it."""
    for path in paths:
        if "@" not in str(path) and not path.exists():
            raise click.BadParameter(f"path '{path}' does not exist.")
    return paths


REFS = click.option(
    "--refs",
    type=PATH,
    multiple=True,
    callback=there,
    metavar="WHAT",
    help="What to look for: DIR/<object>/*.png, pictures of one object, a file of `refs`, COCO's "
    "`annotations_*.json`, or a box in a picture or video: [NAME=]FILE[#FRAME]@X,Y,W,H or @MASK. "
    "May be given several times.",
)
_SHARE = click.FloatRange(0, 1)
CONF = click.option("--conf", type=_SHARE, help="Score that an object needs [the bundle's].")
IOU = click.option("--iou", type=_SHARE, help="Largest overlap of two of a name [the bundle's].")
JSON = click.option("--json", "json_file", type=PATH, help="Also write the figures here.")


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of what runs a bundle; the command gets them as ``open_bundle``."""

    @BACKEND
    @PRECISION
    @THREADS
    @HOST_CODE
    @SIGNED
    @wraps(command)
    def with_engines(
        *arguments: Any,
        backend: str,
        precision: str,
        threads: int | None,
        host_code: bool,
        signers: tuple[Path, ...],
        **options: Any,
    ) -> None:
        def open_bundle(bundle: Path, **more: Any) -> System:
            from engineworks.runtime import systems

            opened: System = systems.open_bundle(
                bundle,
                backend=backend,
                precision=precision,
                threads=threads,
                signers=signers,
                host_code=host_code,
                **more,
            )
            return opened

        command(*arguments, open_bundle=open_bundle, **options)

    return with_engines


def prompt_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of what to look for; the command gets them as ``prepare``."""

    @REFS
    @CONF
    @IOU
    @wraps(command)
    def with_prompt(
        *arguments: Any,
        refs: tuple[Path, ...],
        conf: float | None,
        iou: float | None,
        **options: Any,
    ) -> None:
        def prepare(system: System) -> None:
            from engineworks.runtime.systems import prompt

            prompt(system, *refs, conf=conf, iou=iou)

        command(*arguments, prepare=prepare, **options)

    return with_prompt


def names_of(_context: object, _option: object, text: str) -> tuple[str, ...]:
    """``a,b`` -> names, each once; as click calls it."""
    return tuple(dict.fromkeys(filter(None, text.split(","))))


def plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of plans; the command gets ``plans``, ``plan`` and ``timing_cache``."""

    @click.option(
        "--plan",
        "plans",
        default="",
        callback=names_of,
        metavar="LIST",
        help="float,fp16,bf16,int8.",
    )
    @click.option(
        "--profile",
        "profiles",
        multiple=True,
        metavar="AXIS=MIN:OPT:MAX,...",
        help="Sizes of the free axes; may be given several times [batch=1:8:32].",
    )
    @click.option(
        "--workspace",
        "workspace_mib",
        type=click.IntRange(min=1),
        help="MiB of GPU memory [all].",
    )
    @click.option(
        "--optimization",
        "optimization_level",
        type=click.IntRange(0, 5),
        default=3,
        show_default=True,
    )
    @click.option("--no-tf32", is_flag=True, help="Keep all bits of float32 products.")
    @click.option("--terse", is_flag=True, help="Leave what layers are like out of the plan.")
    @click.option("--version-compatible", is_flag=True, help="Also for later TensorRTs.")
    @click.option(
        "--hardware-compatible",
        "hardware",
        type=click.Choice(["none", "same-compute-capability", "ampere-plus"]),
        default="none",
        show_default=True,
        help="Also for other GPUs.",
    )
    @click.option("--weight-streaming", is_flag=True, help="Weights may stay in host memory.")
    @click.option("--timing-cache", type=PATH, help="Folder that keeps timings of kernels.")
    @wraps(command)
    def with_plans(
        *arguments: Any, profiles: tuple[str, ...], no_tf32: bool, terse: bool, **options: Any
    ) -> None:
        from engineworks.runtime.plans import PlanConfig, parse_profile

        same = PlanConfig.model_fields.keys() & options.keys()
        plan = PlanConfig(
            profiles=tuple(parse_profile(profile) for profile in profiles),
            tf32=not no_tf32,
            detailed=not terse,
            **{name: options.pop(name) for name in same},
        )
        command(*arguments, plan=plan, **options)

    return with_plans


def net_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of SYSTEM:NAME; the command gets those that were given as ``options``."""
    names = ("weights", "stages", "norm", "size", "args")

    @click.option(
        "--weights",
        metavar="WHICH",
        help="Of a run: best or last [what it concluded with]; of SYSTEM:NAME: hub, none or "
        "FILE.safetensors [hub].",
    )
    @click.option("--stages", metavar="LIST", help="Maps, e.g. 2,3 [the last of the whole net].")
    @click.option("--norm", is_flag=True, default=None, help="Blocks behind the net's last norm.")
    @click.option("--size", metavar="H,W", help="Of its images in pixels [its own].")
    @click.option("--args", metavar="YAML", help="Of timm, e.g. {pad_type: same}.")
    @wraps(command)
    def with_net(*positional: Any, **options: Any) -> None:
        net = {name: options.pop(name) for name in names}
        given = {name: value for name, value in net.items() if value is not None}
        command(*positional, options=given, **options)

    return with_net


def read_bundle(folder: Path, signers: Sequence[Path] = ()) -> Bundle:
    """A checked bundle, signed by one of these keys where there are any."""
    from engineworks.runtime.bundle import read

    opened = read(folder)
    if signers:
        from engineworks.runtime.signing import check_signature

        check_signature(opened, signers)
    return opened
