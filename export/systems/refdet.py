"""``refdet``: two graphs, so that what is looked for can be changed without exporting again."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from export.quantize import KeepFloat
from export.systems import Contents, Recipe, Source, read_json
from runtime.systems.refdet import Params
from training.run import open_run
from training.systems.refdet.config import TaskConfig
from training.systems.refdet.eager import trained_net
from training.systems.refdet.model import Detect, Encode, prototype_widths

_DRAWS = 8  # examples that the clearest is taken of


def graphs(run: Path) -> dict[str, Source]:
    """``encode`` and ``detect``, M being ``num_candidates``.

    encode: images (batch, 3, S, S) -> prototypes (batch, P), both float32. detect: images
    (batch, 3, H, W) and prototypes (objects, P), float32 -> boxes (batch, M, 4) float32 xyxy in
    pixels, scores (batch, M) float32 in [0, 1], classes (batch, M) int64.
    """
    opened = open_run(run)
    assert isinstance(opened.config, TaskConfig)
    model = trained_net(opened)
    detect = Detect(model, opened.config.num_candidates).eval()
    generator = torch.Generator().manual_seed(0)

    def images(batch: int, size: tuple[int, int]) -> Tensor:
        return torch.randn(batch, 3, *size, generator=generator)

    def prototypes(objects: int) -> Tensor:
        rows_NP = torch.randn(objects, sum(model.detector.widths), generator=generator)
        parts = torch.split(rows_NP, list(model.detector.widths), dim=1)
        return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)

    def clearest(num_frames: int, num_objects: int) -> tuple[Tensor, Tensor]:
        drawn = [(images(num_frames, frames), prototypes(num_objects)) for _ in range(_DRAWS)]
        return max(drawn, key=lambda example: _clearance(detect, *example))

    references, frames = opened.config.reference_preprocess.size, opened.config.preprocess.size
    return {
        "encode": Source(
            module=Encode(model).eval(),
            inputs=("images",),
            outputs=("prototypes",),
            examples=((images(2, references),), (images(1, references),)),
            free={"images": {0: "batch"}},
        ),
        "detect": Source(
            module=detect,
            inputs=("images", "prototypes"),
            outputs=("boxes", "scores", "classes"),
            examples=(clearest(2, 3), clearest(1, 1)),
            free={"images": {0: "batch"}, "prototypes": {0: "objects"}},
        ),
    }


@torch.no_grad()
def _clearance(detect: Detect, frames_BCHW: Tensor, prototypes_NP: Tensor) -> float:
    """By how much the logit of the last candidate exceeds that of the first anchor left out.

    Where it is next to nothing, two libraries may choose differently, and both be right.
    """
    logits_BA = detect.anchors(frames_BCHW, prototypes_NP)[0].sort(dim=1, descending=True).values
    gap_BA = -logits_BA.diff(dim=1)
    last = detect.num_candidates - 1
    return float(gap_BA[:, last].min()) if last < gap_BA.shape[1] else float("inf")


def contents(run: Path) -> Contents:
    """The base classes' names and the references that ``finish`` left in the run."""
    opened = open_run(run)
    assert isinstance(opened.config, TaskConfig)
    params = Params(
        reference_preprocess=opened.config.reference_preprocess,
        widths=prototype_widths(opened.config.detector),
        inference=opened.config.inference,
    )
    return Contents(
        preprocess=opened.config.preprocess,
        params=params.model_dump(mode="json"),
        thresholds={},
        assets={"references": run / "references.npz"},
        labels=tuple(read_json(run, "labels")),
    )


# What adds up over many layers (the residual stream of a transformer above all) stays float, and so
# does what little work the last layers are: projections of the prototype, gates, and whatever says
# where, what and how sure. Attention's products, norms and the decoding have no weights: the
# quantizer leaves them alone.
_KEEP_FLOAT = KeepFloat(
    op_types=frozenset({"Add"}),
    patterns=(
        r"encoder\.projections\..*",
        r"detector\.fusion\.gates\..*",
        r"detector\.head\..*\b(out|objectness\.\d|embed\.\d\.1|classify\.\d\.1)",
    ),
)

RECIPE = Recipe(
    graphs=graphs,
    contents=contents,
    gate={"map50": 0.01, "map50_95": 0.01},
    keep_float=_KEEP_FLOAT,
)
