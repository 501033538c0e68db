"""What few-shot detection costs in training: a whole step against a plain detector's.

    python -m tests.benchmarks.refdet_step

Both have the same backbone, frames and boxes; the plain one has a head for base classes alone and
no references. Random weights and noise for pictures: neither changes the time. The steps take
turns, so that what else the machine does meets all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engineworks.training.allocator import keep_freed_memory
from engineworks.training.config import validate
from engineworks.training.profiler import Profiler
from engineworks.training.systems.refdet.assign import pad
from engineworks.training.systems.refdet.backbone import Backbone
from engineworks.training.systems.refdet.config import TaskConfig, WeightsConfig
from engineworks.training.systems.refdet.head import BaseBranch, Output, anchors
from engineworks.training.systems.refdet.loss import DetectionLoss
from engineworks.training.systems.refdet.task import build_model

SIZE, REFERENCE, BATCH, WAYS, SHOTS, BASE, BOXES = 640, 256, 8, 2, 3, 80, 4
PUBLISHED = [128, 256, 512, 512]  # channels behind the fusion
THREADS, STEPS = 2, 5
ALL = WeightsConfig(prototype=1.0, supervised=1.0, proposals=0.5, triplet=0.2)


def config(*, train_blocks: int, outputs: list[int] | None = None) -> TaskConfig:
    letterbox = {"resize": "letterbox"}
    tree = {
        "system": "refdet",
        "preprocess": {"size": [SIZE, SIZE], **letterbox},
        "reference_preprocess": {"size": [REFERENCE, REFERENCE], **letterbox},
        "encoder": {
            "name": "vit_small_patch16_dinov3",
            "weights": "none",
            "train_blocks": train_blocks,
        },
        "detector": {
            "scales": [2, 3, 4, 5],
            "outputs": outputs,
            "channels_last": True,
        },
        "base": True,
        "stages": [{"name": "all"}],
    }
    return validate(TaskConfig, tree)


def episode() -> dict[str, Any]:
    """What ``data`` gives, of noise."""
    corners = torch.rand(BATCH, BOXES, 2) * (SIZE - 100)
    boxes = torch.cat([corners, corners + 20 + 80 * torch.rand(BATCH, BOXES, 2)], -1)
    objects = torch.randint(WAYS, (BATCH, BOXES))
    frames = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    return {
        "images": frames,
        "pictures": torch.randn(WAYS * SHOTS, 3, REFERENCE, REFERENCE),
        "object_of_picture": torch.arange(WAYS).repeat_interleave(SHOTS),
        "prompted": torch.ones(BATCH, WAYS, dtype=torch.bool),
        "boxes": list(boxes),
        "objects": list(objects),
        "base": list(torch.randint(BASE, (BATCH, BOXES))),
    }


def few_shot(
    settings: TaskConfig, weights: WeightsConfig, batch: Mapping[str, Any], *, kept: bool
) -> Callable[[], None]:
    """A step with both branches.

    Args:
        kept: the encoder's features are those of an earlier step.
    """
    model, _ = build_model(settings, BASE)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    features = model.net.encoder.features(batch["pictures"]).detach() if kept else None

    def run() -> None:
        model(batch, features, weights)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


class Plain(nn.Module):
    """The same backbone with the base classes' branch alone."""

    def __init__(self, settings: TaskConfig) -> None:
        super().__init__()
        detector = settings.detector
        self.backbone = Backbone(detector.scales, width=detector.width, depth=detector.depth)
        self.head = BaseBranch(
            self.backbone.channels,
            BASE,
            bins=detector.reg_max,
            separable=detector.separable,
            prior=detector.prior,
        )
        self.strides = tuple(2**scale for scale in detector.scales)
        self.criterion = DetectionLoss(settings.loss)
        self.to(memory_format=torch.channels_last)

    def forward(self, batch: Mapping[str, Any], weights: WeightsConfig) -> Tensor:
        maps = self.backbone(batch["images"])
        raw = self.head(maps)
        output = Output(raw, None, *anchors(maps, self.strides), self.strides)
        losses, _ = self.criterion(
            raw.logits_BAC,
            raw.distances_BA4R,
            output.boxes(raw),
            output.anchors_A2,
            output.strides_A,
            pad(batch["boxes"], batch["base"]),
        )
        return torch.stack([getattr(weights, name) * loss for name, loss in losses.items()]).sum()


def plain(settings: TaskConfig, batch: Mapping[str, Any]) -> Callable[[], None]:
    model = Plain(settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> None:
        model(batch, ALL).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    batch = episode()
    frozen, partly = config(train_blocks=0), config(train_blocks=6)
    wide = config(train_blocks=0, outputs=PUBLISHED)
    runs = {
        "plain": plain(frozen, batch),
        "references kept": few_shot(frozen, ALL, batch, kept=True),
        "references kept, no contrast": few_shot(frozen, WeightsConfig(), batch, kept=True),
        "references encoded": few_shot(frozen, ALL, batch, kept=False),
        "as wide as published": few_shot(wide, ALL, batch, kept=True),
        "half of the encoder learns": few_shot(partly, ALL, batch, kept=False),
        # the same thing twice: how much of a difference is noise
        "plain again": plain(frozen, batch),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(STEPS + 1):
        for name, run in runs.items():
            elapsed = milliseconds(run)
            if turn:
                times[name].append(elapsed)
    print(
        f"{SIZE} px, {BATCH} frames, {WAYS} objects of {SHOTS} references at {REFERENCE} px, "
        f"{THREADS} threads, {STEPS} turns"
    )
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["plain"], strict=True)]
        print(
            f"{name:29s} median {statistics.median(values):8.0f} ms, "
            f"ratio per turn: median {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})"
        )
    with Profiler() as profiler:
        runs["references encoded"]()
    shares = ", ".join(f"{k} {v['share']:.1%}" for k, v in profiler.shares().items())
    print(f"\nreferences encoded: {shares} (other: backward and optimizer)")


if __name__ == "__main__":
    keep_freed_memory()  # as in training
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    main()
