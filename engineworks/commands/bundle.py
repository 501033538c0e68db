"""``bundle`` and ``bank``: look at a bundle, check it, sign it, move what it decides by."""

from __future__ import annotations

import json
from pathlib import Path

import click

from engineworks.commands.options import BACKEND, EXIST_OK, FOLDER, OUT, PATH, THREADS, read_bundle
from engineworks.commands.printing import echo, print_gate, write_json
from engineworks.runtime.claims import claim
from engineworks.runtime.errors import UsageError


@click.group()
def bundle() -> None:
    """Look at a bundle, check it, sign it, move its thresholds."""


@bundle.command()
@click.argument("folder", type=PATH)
def show(folder: Path) -> None:
    """What a bundle is, after checking all of it."""
    from engineworks.runtime.bundle import read

    manifest = read(folder).manifest
    echo(f"{manifest.system}, schema {manifest.schema_version}, {manifest.digest[:12]}")
    for name, graph in manifest.graphs.items():
        tensors = [f"{n} {spec.describe()}" for n, spec in graph.inputs.items()]
        echo(f"graph {name}: {', '.join(tensors)}; {', '.join(graph.variants)}")
    for name, threshold in manifest.thresholds.items():
        echo(f"threshold {name}: {threshold.value:.4f} ({threshold.source})")
    print_gate(manifest.reports.get("gate", {}))
    if verdict := manifest.reports.get("verdict"):
        from engineworks.runtime.verdict import describe

        for line in describe(verdict):
            echo(line)


@bundle.command(name="set-threshold")
@click.argument("folder", type=PATH)
@click.argument("name")
@click.argument("value", required=False)
@click.option(
    "--budget",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of good pictures that may be rejected: the border comes from held-out scores.",
)
def set_threshold(folder: Path, name: str, value: str | None, budget: float | None) -> None:
    """Move a decision border without exporting again.

    VALUE is a number, or the name of another threshold of the bundle, such as image_f1max; in its
    place --budget needs neither a number nor pictures.
    """
    from engineworks.runtime import bundle as bundles

    if (value is None) == (budget is None):
        raise UsageError("set-threshold takes a VALUE or --budget", fix="give one of the two")
    opened = bundles.read(folder)
    if budget is not None:
        moved = bundles.set_budget(opened, name, budget)
        echo(f"{name} = {moved.manifest.thresholds[name].value:g}")
        return
    assert value is not None
    known = opened.manifest.thresholds
    try:
        number = known[value].value if value in known else float(value)
    except ValueError as error:
        raise UsageError(
            f"'{value}' is neither a number nor a threshold of {folder}",
            fix=f"give a number or one of {', '.join(sorted(known))}",
        ) from error
    bundles.set_threshold(opened, name, number)
    echo(f"{name} = {number:g}")


@bundle.command()
@click.argument("key", type=PATH)
def keygen(key: Path) -> None:
    """Make a pair of keys to sign with: KEY, which stays with you, and KEY.pub for everybody."""
    from engineworks.runtime.signing import make_keys

    public = key.with_name(f"{key.name}.pub")
    make_keys(key, public)
    echo(f"{key}\n{public}")


@bundle.command(name="sign")
@click.argument("folder", type=PATH)
@click.option("--key", type=PATH, required=True, help="Private key: Ed25519, PEM or OpenSSH.")
def sign_bundle(folder: Path, key: Path) -> None:
    """Sign a bundle, after checking all of it."""
    from engineworks.runtime.bundle import read
    from engineworks.runtime.signing import sign

    opened = read(folder)
    sign(opened, key, password=lambda: click.prompt("password of the key", hide_input=True))
    echo(f"signed {folder}, {opened.manifest.digest[:12]}")


@bundle.command(name="verify")
@click.argument("folder", type=PATH)
@click.option("--key", "keys", type=PATH, multiple=True, help="Public key that must have signed.")
def verify_bundle(folder: Path, keys: tuple[Path, ...]) -> None:
    """Check all of a bundle and, with --key, who signed it."""
    opened = read_bundle(folder, keys)
    echo(f"{folder}, {opened.manifest.digest[:12]}: whole{', and signed' if keys else ''}")


@bundle.command()
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, help="File to write [standard output].")
def sbom(folder: Path, out: Path | None) -> None:
    """What made a bundle, as a bill of materials (CycloneDX)."""
    from engineworks.runtime.bundle import read
    from engineworks.runtime.sbom import describe

    bill = describe(read(folder))
    if out is None:
        echo(json.dumps(bill, indent=2))
    else:
        write_json(out, bill)


@bundle.command()
@click.argument("folder", type=PATH)
@OUT
@click.option("--name", help="Of the model [the bundle's folder].")
@EXIST_OK
def triton(folder: Path, out: Path, name: str | None, exist_ok: bool) -> None:
    """Write a bundle as a model repository of Triton.

    The whole system is a model of the Python backend; each graph is one of its own, for servers
    with ONNX Runtime or TensorRT.
    """
    from engineworks.runtime.bundle import read
    from engineworks.runtime.serving.triton import write_repository

    name = name or folder.resolve().name
    for model in write_repository(read(folder), out, name, exist_ok=exist_ok):
        echo(model)


@click.group()
def bank() -> None:
    """Change the memory bank of a trained bundle."""


@bank.command()
@click.argument("source", type=PATH)
@click.option("--images", type=FOLDER, required=True, help="New normal images.")
@OUT
@click.option("--max-rows", type=click.IntRange(min=1), default=1000, show_default=True)
@EXIST_OK
@BACKEND
@THREADS
def add(
    source: Path,
    images: Path,
    out: Path,
    max_rows: int,
    exist_ok: bool,
    backend: str,
    threads: int | None,
) -> None:
    """Extend the bank of bundle SOURCE with new normal images."""
    from engineworks.runtime.bundle import read
    from engineworks.runtime.systems import extend

    with claim(out):  # before it is read: it may be the bundle that is extended
        count = extend(
            read(source),
            images,
            out,
            max_rows=max_rows,
            backend=backend,
            threads=threads,
            exist_ok=exist_ok,
        )
    echo(f"{count} rows added, {out}")
