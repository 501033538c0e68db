"""What an engine gains in the place of a frozen net: features alone, and the training around them.

    python -m tests.benchmarks.features [--weights FILE] [--samples DIR] [--threads 2]

Features are timed in batches of 8: eager PyTorch in float32, the float graph, the INT8 graph. The
steps are one pass of ``noising`` over 32 pictures, and an episode of ``refdet`` whose references
are all new. All take turns. Without ``--samples`` INT8 is calibrated on drawn pictures; weights
that are random change no time, and ``--weights`` are those of ResNet-18.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from engineworks.export.config import ExportConfig
from engineworks.export.pipeline import export
from engineworks.export.systems.backbone import trace_backbone
from engineworks.runtime import bench
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.testing import write_flowers
from engineworks.training import backbones
from engineworks.training.allocator import keep_freed_memory
from engineworks.training.config import BackboneConfig
from engineworks.training.systems.noising.model import PatchFeatures
from engineworks.training.systems.refdet.task import build_model
from tests.benchmarks import refdet_step

BATCH, PASS = 8, 32
DINO = BackboneConfig(name="vit_small_patch16_dinov3", weights="none")
RESNET = BackboneConfig(name="resnet18", weights="none", stages=(2, 3))
SIZE = (256, 256)


def rivals(config: BackboneConfig, bundle: Bundle) -> dict[str, nn.Module]:
    """The same net by PyTorch and by every engine of interest."""
    found = {"eager float32": backbones.create(config, size=SIZE).net.requires_grad_(False).eval()}
    for precision in ("float", "int8"):
        engined = config.model_copy(
            update={
                "engine": str(bundle.root),
                "engine_backend": "openvino",
                "engine_precision": precision,
            }
        )
        found[f"engine {precision}"] = backbones.create(engined).net
    return found


def say(title: str, calls: Mapping[str, Callable[[], object]], seconds: float) -> None:
    """Time calls in turns; the first is what the others are compared with."""
    timings = bench.interleave(calls, max_seconds=seconds)
    first = next(iter(timings))
    click.echo(f"\n{title}")
    for name, timing in timings.items():
        ratio = bench.ratio(timings[first], timing)
        click.echo(
            f"{name:15s} median {timing.p50_ms:9.2f} ms, {ratio.median:.2f}x "
            f"({ratio.low:.2f} to {ratio.high:.2f}), {timing.verdict}"
        )


def maps(net: nn.Module, images_BCHW: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return net(images_BCHW)

    return call


def cosine(nets: Mapping[str, nn.Module], images_BCHW: Tensor) -> str:
    """Mean cosine of places of the last map to those of the first net, per net."""
    with torch.inference_mode():
        last = {name: net(images_BCHW)[-1].flatten(2) for name, net in nets.items()}
    want = next(iter(last.values()))
    means = {name: nn.functional.cosine_similarity(x, want).mean() for name, x in last.items()}
    return ", ".join(f"{name} {mean:.5f}" for name, mean in means.items())


def episode(config: BackboneConfig) -> Callable[[], None]:
    """A step of ``refdet`` that meets all of its references for the first time."""
    settings = refdet_step.config(train_blocks=0)
    encoder = settings.encoder.model_copy(
        update={name: getattr(config, name) for name in type(config).model_fields}
    )
    model, _ = build_model(settings.model_copy(update={"encoder": encoder}), refdet_step.BASE)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = refdet_step.episode()

    def run() -> None:
        with torch.no_grad():
            features_RF = torch.cat(
                [model.net.encoder.features(x[None]) for x in batch["pictures"]]
            )
        model(batch, features_RF, refdet_step.ALL)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


@click.command()
@click.option("--weights", default="none", help="Of ResNet-18: hub, none or FILE.safetensors.")
@click.option("--samples", type=click.Path(path_type=Path), help="Pictures to calibrate on.")
@click.option("--threads", default=2, show_default=True)
@click.option("--seconds", default=20.0, show_default=True, help="Per table.")
@click.option("--steps/--no-steps", default=True, help="Also time training steps.")
def main(weights: str, samples: Path | None, threads: int, seconds: float, steps: bool) -> None:
    """Print every table."""
    keep_freed_memory()  # as in training
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shown = samples or write_flowers(work / "flowers", size=SIZE)
        resnet = RESNET.model_copy(update={"weights": weights})
        engined = {}
        for config in (resnet, DINO):
            floats = trace_backbone(config, work / f"{config.name}-float", size=SIZE)
            settings = ExportConfig(
                int8=True, samples=shown, num_samples=24, method="mse", threads=threads
            )
            bundle = export(floats, work / config.name, settings, say=lambda _: None)
            nets = rivals(config, bundle)
            x = torch.randn(BATCH, 3, *SIZE)
            title = f"{config.name}, {SIZE[0]} px, batch {BATCH}, {threads} threads"
            say(title, {name: maps(net, x) for name, net in nets.items()}, seconds)
            click.echo(f"cosine on noise: {cosine(nets, x)}")
            engined[config.name] = (nets, bundle)
        if not steps:
            return
        nets, _ = engined[resnet.name]
        channels = backbones.create(resnet).channels
        passes = {name: PatchFeatures(net, channels).eval() for name, net in nets.items()}
        pictures = torch.randn(PASS, 3, *SIZE).split(BATCH)  # type: ignore[no-untyped-call]

        def whole(model: nn.Module) -> Callable[[], object]:
            def call() -> object:
                with torch.inference_mode():
                    return [model(part) for part in pictures]

            return call

        title = f"noising, features of {PASS} pictures"
        say(title, {name: whole(model) for name, model in passes.items()}, seconds)
        _, bundle = engined[DINO.name]
        runs = {"eager float32": episode(DINO)}
        for precision in ("float", "int8"):
            update = {"engine": str(bundle.root), "engine_precision": precision}
            runs[f"engine {precision}"] = episode(DINO.model_copy(update=update))
        say("refdet, a whole step with new references", runs, 2 * seconds)


if __name__ == "__main__":
    main()
