"""The same system in eager PyTorch: what a benchmark compares the bundle with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engineworks.runtime.bundle import Bundle
from engineworks.runtime.contenders import Contender
from engineworks.runtime.errors import RunError
from engineworks.runtime.preprocess import apply
from engineworks.runtime.results import Classification
from engineworks.runtime.systems.paco import Params
from engineworks.runtime.tensors import Array
from engineworks.training import eager
from engineworks.training.run import Run, open_run
from engineworks.training.systems.paco.config import TaskConfig
from engineworks.training.systems.paco.model import Paco
from engineworks.training.systems.paco.task import build_model, trained_weights


class EagerPaco:
    """Images to results in torch."""

    def __init__(self, network: eager.Network, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self.network = network
        self.spec = manifest.preprocess
        self.labels = manifest.labels
        params = bundle.params(Params)
        self.num_top = min(params.num_top, len(self.labels))
        known = params.confidence.get("float")
        self.temperature, self.equal = (
            (1.0, 0.0) if known is None else (known.temperature, known.equal)
        )

    @torch.inference_mode()
    def forward(self, images_BCHW: Array) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) float32 -> logits (B, classes), embedding (B, F), both float32."""
        logits_BC, embedding_BF = self.network(eager.to_channels_last(images_BCHW))
        return logits_BC.float(), embedding_BF.float()

    @torch.inference_mode()
    def infer(self, images: Sequence[Array]) -> list[Classification]:
        """See ``runtime.systems.paco.System.infer``; without prediction sets."""
        logits_BC, embedding_BF = self.forward(apply(self.spec, images))
        probability_BC = (logits_BC / self.temperature).softmax(1)
        probability_BC = (1 - self.equal) * probability_BC + self.equal / logits_BC.shape[1]
        best = probability_BC.topk(self.num_top)
        return [
            Classification(
                label=self.labels[indices[0]],
                index=indices[0],
                probability=values[0],
                top=tuple((self.labels[i], p) for i, p in zip(indices, values, strict=True)),
                embedding_F=embedding_F,
            )
            for indices, values, embedding_F in zip(
                best.indices.tolist(), best.values.tolist(), embedding_BF.numpy(), strict=True
            )
        ]


def trained_net(run: Run) -> Paco:
    """What of a run answers at inference, with its best weights, in eval mode.

    Raises:
        RunError, WeightsError: the run has no weights, or damaged ones.
    """
    assert isinstance(run.config, TaskConfig)
    own = trained_weights(run)
    config = run.config.model_copy(update={"backbone": run.config.backbone.plain()})
    net = build_model(config, len(own["classifier.weight"]), weights=False)[0].net
    net.load_state_dict(own)
    return net.eval()


def contenders(
    run: Path, bundle: Bundle, *, threads: int, say: Callable[[str], None]
) -> list[Contender]:
    """Eager and compiled PyTorch rows for the bundle that was exported from ``run``.

    Raises:
        RunError: the folder is no finished run of ``paco``.
    """
    opened = open_run(run)
    if not isinstance(opened.config, TaskConfig):
        raise RunError(f"{run} is a run of '{opened.info.system}', the bundle is of 'paco'")
    return eager.contenders(
        trained_net(opened),
        lambda network: EagerPaco(network, bundle),
        threads=threads,
        say=say,
    )
