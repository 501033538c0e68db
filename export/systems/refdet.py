"""``refdet``: two graphs, so that what is looked for can be changed without exporting again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engineworks.export.quantize import KeepFloat
from engineworks.export.systems import TRANSFORMER, Contents, Recipe, Source
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.references import alone, centred, load_references
from engineworks.runtime.systems.refdet.detecting import FollowParams, Params
from engineworks.training.run import Run, open_run, read_json
from engineworks.training.systems.refdet.config import TaskConfig
from engineworks.training.systems.refdet.eager import trained_matcher, trained_net
from engineworks.training.systems.refdet.match import AT_ONCE, DetectMatch, EncodeTemplate, follower
from engineworks.training.systems.refdet.model import Detect, Encode, prototype_widths

_REFERENCES = "references.npz"


def graphs(run: Path) -> dict[str, Source]:
    """``encode`` and ``detect``, M being ``num_candidates``.

    encode: images (batch, 3, S, S) -> prototypes (batch, P), both float32. detect: images
    (batch, 3, H, W) and prototypes (objects, P), float32 -> boxes (batch, M, 4) float32 xyxy in
    pixels, scores (batch, M) float32 in [0, 1], classes (batch, M) int64.
    """
    opened = open_run(run)
    assert isinstance(opened.config, TaskConfig)
    config = opened.config
    if config.match is not None:
        return _matching(opened, config)
    model = trained_net(opened)
    encode, detect = Encode(model).eval(), Detect(model, config.num_candidates).eval()
    references = load_references(run / _REFERENCES)
    pictures = [alone(picture) for found in references.values() for picture in found]
    generator = torch.Generator().manual_seed(0)

    def shaken(spec: PreprocessSpec, num: int) -> Tensor:
        """References as network input, with noise; to mere noise a detector is blind."""
        chosen = torch.randint(len(pictures), (num,), generator=generator).tolist()
        images = torch.from_numpy(apply(spec, [pictures[i] for i in chosen]))
        return images + 0.2 * torch.randn(images.shape, generator=generator)

    spec = config.reference_preprocess
    with torch.no_grad():
        examples = [
            (shaken(config.preprocess, frames), encode(shaken(spec, objects)))
            for frames, objects in ((2, 3), (1, 1))
        ]
    return {
        "encode": Source(
            module=encode,
            inputs=("images",),
            outputs=("prototypes",),
            examples=((shaken(spec, 2),), (shaken(spec, 1),)),
            free={"images": {0: "batch"}},
            shapes={"prototypes": ("batch", sum(prototype_widths(config.detector)))},
        ),
        "detect": Source(
            module=detect,
            inputs=("images", "prototypes"),
            outputs=("boxes", "scores", "classes"),
            examples=tuple(examples),
            free={"images": {0: "batch"}, "prototypes": {0: "objects"}},
            before_choice=detect.before_choice,
        ),
    }


def _matching(run: Run, config: TaskConfig) -> dict[str, Source]:
    """The same graphs of a matcher; ``encode`` also takes the object's box, (batch, 4) float32."""
    assert config.match is not None
    matcher = trained_matcher(run)
    encode = EncodeTemplate(matcher).eval()
    detect = DetectMatch(matcher, config.num_candidates).eval()
    found = [each for views in load_references(run.root / _REFERENCES).values() for each in views]
    views = [
        centred(config.reference_preprocess, config.match.object_share, each) for each in found
    ]
    views = [views[i % len(views)] for i in range(3)]
    pictures = torch.from_numpy(apply(config.reference_preprocess, [v.image for v in views]))
    boxes = torch.tensor([view.box for view in views], dtype=torch.float32)
    frames = torch.from_numpy(apply(config.preprocess, [v.image for v in views]))
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    frames = frames + 0.2 * noise
    with torch.no_grad():
        rows = encode(pictures, boxes)
    detects = {"detect": (detect, frames)}
    if (follow := config.match.follow) is not None:
        smaller = torch.nn.functional.interpolate(frames, follow.size, mode="bilinear")
        detects["follow"] = (follower(matcher, follow).eval(), smaller)
    return {
        "encode": Source(
            module=encode,
            inputs=("images", "boxes"),
            outputs=("prototypes",),
            examples=((pictures[:2], boxes[:2]), (pictures[2:], boxes[2:])),
            free={"images": {0: "batch"}, "boxes": {0: "batch"}},
            shapes={"prototypes": ("batch", matcher.width)},
        ),
        **{
            name: Source(
                module=module,
                inputs=("images", "prototypes"),
                outputs=("boxes", "scores", "classes"),
                examples=((shown[:2], rows), (shown[2:], rows[:1])),
                free={"images": {0: "batch"}, "prototypes": {0: "objects"}},
                before_choice=module.before_choice,
                keep_float=KeepFloat(patterns=(r"(matcher\.)?(score|kind|relation\..*)",)),
            )
            for name, (module, shown) in detects.items()
        },
    }


def contents(run: Path) -> Contents:
    """The base classes' names and the references that ``finish`` left in the run."""
    opened = open_run(run)
    assert isinstance(opened.config, TaskConfig)
    match = opened.config.match
    params = Params(
        reference_preprocess=opened.config.reference_preprocess,
        widths=(
            prototype_widths(opened.config.detector)
            if match is None
            else (trained_matcher(opened).width,)
        ),
        object_share=None if match is None else match.object_share,
        inference=opened.config.inference,
        learned=tuple(read_json(run, "learned")) if (run / "learned.json").is_file() else (),
        at_once=1 if match is None else AT_ONCE,
        follow=_following(opened.config),
    )
    return Contents(
        preprocess=opened.config.preprocess,
        params=params.model_dump(mode="json"),
        thresholds={},
        assets={"references": run / _REFERENCES},
        labels=tuple(read_json(run, "labels")),
    )


def _following(config: TaskConfig) -> FollowParams | None:
    follow = None if config.match is None else config.match.follow
    if follow is None:
        return None
    return FollowParams(
        preprocess=config.preprocess.model_copy(update={"size": follow.size}),
        share=follow.share,
        every=follow.every,
        most=follow.most,
        nearness=follow.nearness,
        steadiness=follow.steadiness,
        agility=follow.agility,
    )


# Beside what a transformer keeps, what little work the last layers are stays float: projections of
# the prototype, gates, and whatever says where, what and how sure. The decoding has no weights: the
# quantizer leaves it alone. Nor do integers save anything in depthwise convolutions and the
# attention of the fusion, whose inputs and outputs are float on the other side.
_KEEP_FLOAT = KeepFloat(
    op_types=TRANSFORMER.op_types,
    patterns=(
        r"encoder\.projections\..*",
        r"detector\.fusion\.(gates|attentions|smooth|bottom_up)\..*",
        r"detector\.fusion\.refine\.\d\.0",
        r"detector\.head\..*\b(embed\.\d\.0|classify\.\d\.0|body)\.0\.0",
        r"detector\.head\..*\b(out|objectness\.\d|embed\.\d\.1|classify\.\d\.1)",
    ),
)

RECIPE = Recipe(
    graphs=graphs,
    contents=contents,
    gate={"map50": 0.01, "map50_95": 0.01},
    keep_float=_KEEP_FLOAT,
)
