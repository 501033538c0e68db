"""The same system in eager PyTorch: what a benchmark compares the bundle with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engineworks.runtime.bundle import Bundle
from engineworks.runtime.contenders import Contender
from engineworks.runtime.errors import RunError
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.references import alone, centred, load_references
from engineworks.runtime.results import Detection, Detections
from engineworks.runtime.systems.refdet import detecting
from engineworks.runtime.tensors import Array
from engineworks.training import eager
from engineworks.training.backbones import read_weights
from engineworks.training.run import Run, open_run, read_json
from engineworks.training.systems.refdet.config import TaskConfig
from engineworks.training.systems.refdet.match import DetectMatch, Matcher
from engineworks.training.systems.refdet.match_task import build_matcher
from engineworks.training.systems.refdet.model import Detect, Encode, RefDet

_NET = "net."  # within what trained it
_BASE_BIAS = "detector.head.base.classify.0.1.bias"  # one value per base class


class Prompted(nn.Module):
    """The detector with a prompt that stays: frames (B, 3, H, W) -> boxes, scores, classes."""

    def __init__(self, detect: Detect | DetectMatch, prototypes_NP: Tensor) -> None:
        super().__init__()
        self.detect = detect
        self.register_buffer("prototypes_NP", prototypes_NP)
        self.prototypes_NP: Tensor

    def forward(self, frames_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = self.detect(frames_BCHW, self.prototypes_NP)
        return found


class EagerRefDet:
    """Images to results in torch.

    Args:
        network: a ``Prompted``.
        names: of its classes.
    """

    def __init__(self, network: eager.Network, names: Sequence[str], bundle: Bundle) -> None:
        manifest = bundle.manifest
        assert isinstance(manifest.preprocess, PreprocessSpec)
        self.network = network
        self.names = names
        self.spec = manifest.preprocess
        self.config = bundle.params(detecting.Params).inference

    @torch.inference_mode()
    def forward(self, images_BCHW: Array) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) float32 -> boxes (B, M, 4), scores (B, M), both float32, classes (B, M)."""
        boxes_BM4, scores_BM, classes_BM = self.network(eager.to_channels_last(images_BCHW))
        return boxes_BM4.float(), scores_BM.float(), classes_BM

    def infer(self, images: Sequence[Array]) -> list[Detections]:
        """See ``runtime.systems.refdet.System.infer``."""
        nothing = np.empty((0, 0), np.float32)  # the network has its prompt
        answers = detecting.detect(self._run, images, nothing, self.spec, self.config)
        return [
            Detections(
                tuple(
                    Detection(self.names[kind], score, (x1, y1, x2, y2))
                    for (x1, y1, x2, y2), score, kind in zip(
                        boxes_K4.tolist(), scores_K.tolist(), classes_K.tolist(), strict=True
                    )
                )
            )
            for boxes_K4, scores_K, classes_K in answers
        ]

    def _run(self, images_BCHW: Array, _prototypes_NP: Array) -> tuple[Array, Array, Array]:
        boxes_BM4, scores_BM, classes_BM = self.forward(images_BCHW)
        return boxes_BM4.numpy(), scores_BM.numpy(), classes_BM.numpy()


def trained_net(run: Run) -> RefDet:
    """Both nets of a run with its best weights, in eval mode.

    Raises:
        RunError, WeightsError: the run has no weights, or damaged ones.
    """
    assert isinstance(run.config, TaskConfig)
    weights = read_weights(run.weights())
    own = {n.removeprefix(_NET): tensor for n, tensor in weights.items() if n.startswith(_NET)}
    # as its ``plain``
    detector = run.config.detector.model_copy(update={"compile": False, "checkpointing": False})
    model = RefDet(
        run.config.encoder.plain(),
        detector,
        len(own.get(_BASE_BIAS, ())),
        reference_size=run.config.reference_preprocess.size,
        weights=False,
    )
    model.load_state_dict(own)
    return model.eval()


def trained_matcher(run: Run) -> Matcher:
    """The matcher of a run, in eval mode.

    Raises:
        RunError, WeightsError: the run has no weights, or damaged ones.
    """
    assert isinstance(run.config, TaskConfig)
    plain = run.config.model_copy(update={"encoder": run.config.encoder.plain()})
    matcher = build_matcher(plain, weights=False)
    matcher.load_state_dict(read_weights(run.weights()))
    if (run.root / "confidence.json").is_file():
        matcher.calibrate(**read_json(run.root, "confidence"))
    return matcher.eval()


@torch.inference_mode()
def matching(model: Matcher, bundle: Bundle, num_candidates: int) -> tuple[Prompted, list[str]]:
    """The matcher that looks for the bundle's own references, and their names."""
    found = load_references(bundle.asset("references"))
    params = bundle.params(detecting.Params)
    assert params.object_share is not None
    rows = []
    for pictures in found.values():
        spec = params.reference_preprocess
        views = [centred(spec, params.object_share, each) for each in pictures]
        images = torch.from_numpy(apply(spec, [view.image for view in views]))
        boxes = torch.tensor([view.box for view in views], dtype=torch.float32)
        rows.append(model.encode(images, boxes).mean(0))
    return Prompted(DetectMatch(model, num_candidates), torch.stack(rows)), list(found)


@torch.inference_mode()
def prompted(model: RefDet, bundle: Bundle, num_candidates: int) -> tuple[Prompted, list[str]]:
    """The detector that looks for the bundle's own references, and the names of its classes."""
    references = load_references(bundle.asset("references"))
    spec = bundle.params(detecting.Params).reference_preprocess
    pictures = [alone(picture) for found in references.values() for picture in found]
    rows_RP = Encode(model)(torch.from_numpy(apply(spec, pictures)))
    object_of_row = torch.tensor([i for i, found in enumerate(references.values()) for _ in found])
    prototypes_NP = model.prototypes(rows_RP, object_of_row, len(references))
    return Prompted(Detect(model, num_candidates), prototypes_NP), [
        *bundle.manifest.labels,
        *references,
    ]


def contenders(
    run: Path, bundle: Bundle, *, threads: int, say: Callable[[str], None]
) -> list[Contender]:
    """Eager and compiled PyTorch rows for the bundle that was exported from ``run``.

    Raises:
        RunError: the folder is no finished run of ``refdet``.
    """
    opened = open_run(run)
    if not isinstance(opened.config, TaskConfig):
        raise RunError(f"{run} is a run of '{opened.info.system}', the bundle is of 'refdet'")
    num = opened.config.num_candidates
    network, names = (
        prompted(trained_net(opened), bundle, num)
        if opened.config.match is None
        else matching(trained_matcher(opened), bundle, num)
    )
    return eager.contenders(
        network.eval(),
        lambda way: EagerRefDet(way, names, bundle),
        threads=threads,
        say=say,
    )
