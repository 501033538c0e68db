r"""``noising`` beside anomalib's PatchCore with the same net, rows and pictures: accuracy and time.

    python -m tests.benchmarks.noising_rivals BUNDLE --data DIR --weights FILE [--threads 2]

Rivals: its model in torch, its OpenVINO export, and that by NNCF's stock INT8 quantization. They
take what this project reads: a picture that is decoded, to a score and a map at the network's size.
Needs ``anomalib`` and ``nncf`` beside the development environment. One line of JSON per contender.

Source: Akcay et al., "Anomalib: A Deep Learning Library for Anomaly Detection", 2022.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import nncf
import numpy as np
import openvino as ov
import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel

from engineworks.runtime import bench, datasets, images
from engineworks.runtime.bundle import read
from engineworks.runtime.metrics.anomalies import AnomalyMetrics
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.systems import open_system
from engineworks.runtime.systems.noising import target_mask
from engineworks.runtime.tensors import Array
from engineworks.training.backbones import load_weights, read_weights

Answer = Callable[[Array], tuple[float, Array]]  # picture -> score, map

BATCH = 8
SAMPLED = 50_000  # patches that rows are chosen among, as here by default
CALIBRATED = 64  # as many as the bundle was calibrated with


def fitted(normal: Sequence[Array], spec: PreprocessSpec, weights: Path, rows: int) -> Any:
    """Anomalib's model with as many rows, chosen by its own coreset among as many patches."""
    model = PatchcoreModel(["layer2", "layer3"], "resnet18", pre_trained=False)
    net = model.feature_extractor.feature_extractor
    load_weights(net, read_weights(weights), source=str(weights))
    model.train()
    model.feature_extractor.eval()
    torch.manual_seed(0)
    for start in range(0, len(normal), BATCH):
        model(torch.from_numpy(apply(spec, normal[start : start + BATCH])))
    patches = torch.vstack(model.embedding_store)
    patches = patches[torch.randperm(len(patches))[:SAMPLED]]
    model.embedding_store = [patches]
    model.subsample_embedding(rows / len(patches))
    return model.eval()


class Exported(torch.nn.Module):
    """Its answer as the tuple that can be traced."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.model(images_BCHW)
        return found.pred_score, found.anomaly_map


def in_torch(model: Any, spec: PreprocessSpec) -> Answer:
    def answer(picture: Array) -> tuple[float, Array]:
        with torch.inference_mode():
            found = model(torch.from_numpy(apply(spec, [picture])))
        return float(found.pred_score), found.anomaly_map[0, 0].numpy()

    return answer


def in_openvino(graph: Any, spec: PreprocessSpec, threads: int) -> Answer:
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(threads)}
    request = ov.Core().compile_model(graph, "CPU", options).create_infer_request()

    def answer(picture: Array) -> tuple[float, Array]:
        found = request.infer([apply(spec, [picture])], share_inputs=True)
        score, scores_map = sorted((np.array(value) for value in found.values()), key=np.size)
        return float(score.ravel()[0]), scores_map.reshape(spec.size)

    return answer


def accuracy(answer: Answer, samples: Sequence[datasets.MvtecSample], spec: Any) -> dict[str, Any]:
    metrics = AnomalyMetrics()
    for sample in samples:
        score, scores_map = answer(images.read(sample.path))
        metrics.update(score, sample.label, scores_map, target_mask(sample, spec))
    found = metrics.compute()
    return {name: round(found[name], 4) for name in ("image_auroc", "pixel_auroc")}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--weights", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--threads", default=2)
@click.option("--seconds", default=60.0)
@click.option("--judge/--no-judge", default=True, help="Measure accuracy as well.")
def main(
    bundle: Path, data: Path, weights: Path, threads: int, seconds: float, judge: bool
) -> None:
    torch.set_num_threads(threads)
    opened = read(bundle)
    spec = opened.manifest.preprocess
    assert isinstance(spec, PreprocessSpec)
    contenders: dict[str, Answer] = {}
    networks: dict[str, Callable[[], object]] = {}
    normal = [images.read(sample.path) for sample in datasets.mvtec(data, "train")]
    rows = 0
    for backend in ("openvino", "ort"):
        for precision in ("int8", "float"):
            system: Any = open_system(opened, backend=backend, precision=precision, threads=threads)
            rows = len(system.judge.bank)

            def ours(picture: Array, system: Any = system) -> tuple[float, Array]:
                (found,) = system.infer([picture])
                return found.score, found.map_HW

            contenders[f"{backend} {precision}"] = ours
            feeds = {"images": apply(spec, normal[:1])}
            engine = system.engines["features"]
            networks[f"{backend} {precision}, network"] = lambda e=engine, f=feeds: e.run(f)

    model = fitted(normal, spec, weights, rows)
    contenders["anomalib, torch"] = in_torch(model, spec)
    one = torch.zeros(1, 3, *spec.size)
    exported = ov.convert_model(Exported(model), example_input=one, input=[1, 3, *spec.size])
    contenders["anomalib, OpenVINO"] = in_openvino(exported, spec, threads)
    calibration = nncf.Dataset(normal[:CALIBRATED], lambda picture: apply(spec, [picture]))
    quantized = nncf.quantize(exported, calibration, subset_size=CALIBRATED)
    contenders["anomalib, OpenVINO, NNCF INT8"] = in_openvino(quantized, spec, threads)

    samples = datasets.mvtec(data, "test")
    picture = images.read(samples[0].path)
    calls = {name: lambda a=answer: a(picture) for name, answer in contenders.items()} | networks
    timings = bench.interleave(calls, max_seconds=seconds)
    ours = timings["openvino int8"]
    for name, timing in timings.items():
        ratio = bench.ratio(timing, ours)
        line = {"contender": name, "rows": rows, "p50_ms": round(timing.p50_ms, 2)}
        line |= {"of_openvino_int8": [round(v, 2) for v in (ratio.median, ratio.low, ratio.high)]}
        if judge and name in contenders:
            line |= accuracy(contenders[name], samples, spec)
        click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
