"""``serve``: bundles behind the Open Inference Protocol."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from engineworks.commands.options import (
    PATH,
    OpenBundle,
    Prepare,
    engine_options,
    prompt_options,
)
from engineworks.commands.printing import echo, warn


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...")
@engine_options
@prompt_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--http-port", type=click.IntRange(0, 65535), default=8080, show_default=True)
@click.option("--grpc-port", type=click.IntRange(0, 65535), default=8081, show_default=True)
@click.option(
    "--max-mb", type=click.IntRange(min=1), default=64, show_default=True, help="MiB of a request."
)
@click.option(
    "--max-pictures",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="In a request.",
)
@click.option(
    "--max-requests",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Of a model that run or wait; others are refused.",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds for a request to arrive, and for its answer.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Join pictures of requests that wait; above 1 an answer may differ in its last bits.",
)
@click.option(
    "--max-wait-ms",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="How long a request waits for others to be joined to.",
)
@click.option(
    "--keep",
    nargs=2,
    metavar="DIR doubtful:SIZE",
    help="Keep pictures near the border, or unlike the calibration's, in DIR/<model>.",
)
@click.option("--tls-cert", "certificate", type=PATH, help="PEM file; serves TLS.")
@click.option("--tls-key", "key", type=PATH, help="PEM file of its private key.")
def serve(
    bundles: tuple[str, ...],
    open_bundle: OpenBundle,
    prepare: Prepare,
    max_mb: int,
    max_pictures: int,
    max_requests: int,
    max_batch: int,
    max_wait_ms: float,
    keep: tuple[str, str] | None,
    **options: Any,
) -> None:
    """Serve each BUNDLE by the Open Inference Protocol v2, REST and gRPC.

    A model is named like its bundle's folder, or NAME. POST /v2/repository/models/NAME/load, and
    SIGHUP for all, take what lies in the folder then, once it is verified and warm. Ctrl-C and
    SIGTERM end it, after what runs is answered.
    """
    from engineworks.runtime.doctor import need

    need("kserve", "serve")
    from engineworks.runtime.doubtful import limit_of
    from engineworks.runtime.serving.models import Model
    from engineworks.runtime.serving.server import Config
    from engineworks.runtime.serving.server import serve as run_server

    def open_prepared(folder: Path) -> Any:
        system = open_bundle(folder, max_batch=max_batch, max_wait_ms=max_wait_ms)
        prepare(system)
        return system

    with ExitStack() as stack:
        models = []
        for given in bundles:
            name, is_named, folder = given.rpartition("=")
            path = Path(folder if is_named else given)
            name = name or path.resolve().name
            model = Model(
                name,
                path,
                open_prepared,
                max_requests=max_requests,
                max_pictures=max_pictures,
                keep=None if keep is None else (Path(keep[0]) / name, limit_of(keep[1])),
            )
            stack.callback(model.close)
            echo(model.describe())
            models.append(model)
        config = Config(max_bytes=max_mb << 20, **options)
        if config.host not in ("127.0.0.1", "::1", "localhost") and config.certificate is None:
            warn(f"anybody who reaches {config.host} can ask, and read what is asked: no TLS")
        run_server(models, config, echo)
