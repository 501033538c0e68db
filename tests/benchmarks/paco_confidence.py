"""Does ``paco`` know how sure it is? Calibration, coverage and unknown kinds, on frozen features.

    python cli.py export backbone:NAME --weights FILE --out BUNDLE --int8 --samples DIR --unjudged
    python -m tests.benchmarks.paco_confidence BUNDLE DATA --features FILE.npz [--unknown 4]

All pictures of ``DATA/*/<class>`` (or ``DATA/<class>``) count alike: a test folder of ten pictures
per class could not show a calibration error of 0.03. Their features are computed once, by the float
and by the INT8 graph. Heads are then trained as ``frozen=true`` trains them (same rate, decay,
schedule, epochs) on splits that are drawn class by class:

* ece: five parts; each is judged once, by a head that learned from three others and whose
  temperature was fitted on the fourth. All answers of a seed together give one figure, beside the
  one that chance alone would make of so many pictures.
* coverage and set size: 20 splits, three fifths to learn from, one to fit on, one to judge.
* unknown: the same, with some kinds left out of learning and fitting, and all their pictures judged
  beside the fifth of the known ones.

INT8 has the float head, through the project's quantizer, on features of the INT8 graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import click
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from engineworks.export import passes
from engineworks.export.quantize import activations, quantize, to_unsigned
from engineworks.runtime import images
from engineworks.runtime.bundle import read
from engineworks.runtime.confidence import Confidence
from engineworks.runtime.curves import of_scores
from engineworks.runtime.engines import open_engine
from engineworks.runtime.metrics import ClassificationMetrics
from engineworks.runtime.preprocess import apply
from engineworks.runtime.systems import open_engines
from engineworks.runtime.tensors import Array
from engineworks.training.config import load_config

PRECISIONS = ("float", "int8")
PARTS = 5
BATCH = 16
DRAWS = 20


def pictures(data: Path) -> list[Path]:
    return sorted(
        path
        for path in data.rglob("*")
        if path.is_file() and path.suffix.lower() in images.SUFFIXES
    )


def features(bundle: Path, paths: Sequence[Path], precision: str) -> Array:
    """(N, F) mean of the last map of every picture."""
    opened = read(bundle)
    engine = open_engines(opened, "ort", precision, threads=1)["features"]
    found = []
    with closing(engine):
        (output,) = engine.outputs
        for i in range(0, len(paths), BATCH):
            pixels = [images.read(path) for path in paths[i : i + BATCH]]
            maps = engine.run({"images": apply(opened.manifest.preprocess, pixels)})[output]
            found.append(maps.reshape(*maps.shape[:2], -1).mean(axis=2))
    return np.concatenate(found)


def stratified(label_N: Array, rng: np.random.Generator) -> Array:
    """(N,) number of each picture's part, so that every class is in all parts alike."""
    part_N = np.empty(len(label_N), int)
    for label in np.unique(label_N):
        of = rng.permutation(np.flatnonzero(label_N == label))
        part_N[of] = (np.arange(len(of)) + rng.integers(PARTS)) % PARTS
    return part_N


def head(feature_NF: Array, label_N: Array, seed: int) -> tuple[Array, Array]:
    """Weights (C, F) and biases (C,) of a classifier, trained as ``frozen=true`` trains it."""
    settings = load_config("paco", None, ["frozen=true", "backbone.weights=none"]).train
    optimizer = settings.optimizer
    torch.manual_seed(seed)
    x, y = torch.from_numpy(feature_NF), torch.from_numpy(label_N)
    net = torch.nn.Linear(x.shape[1], int(label_N.max()) + 1)
    adamw = torch.optim.AdamW(
        net.parameters(), lr=optimizer.lr, weight_decay=optimizer.weight_decay
    )
    steps = -(-len(x) // settings.batch_size)
    warmup, total = optimizer.warmup_epochs * steps, settings.epochs * steps

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(1, total - warmup))))

    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, rate)
    for _ in range(settings.epochs):
        for part in torch.randperm(len(x)).split(settings.batch_size):
            loss = torch.nn.functional.cross_entropy(net(x[part]), y[part])
            adamw.zero_grad()
            loss.backward()
            if optimizer.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(net.parameters(), optimizer.clip_norm)
            adamw.step()
            schedule.step()
    return net.weight.detach().numpy(), net.bias.detach().numpy()


def int8_logits(weight_CF: Array, bias_C: Array, seen_NF: Array, feature_NF: Array) -> Array:
    """The head through the quantizer, its range as large as what was seen in training."""
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
        "head",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weight_CF.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight_CF.shape[0]])],
        [numpy_helper.from_array(weight_CF, "w"), numpy_helper.from_array(bias_C, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model = passes.name_nodes(passes.infer_shapes(model))
    amax = float(np.abs(seen_NF).max())
    made = to_unsigned(quantize(model, dict.fromkeys(activations(model), amax)))
    onnx.checker.check_model(made)
    engine = open_engine(made.SerializeToString(), "ort", precision="int8", threads=1)
    with closing(engine):
        return np.asarray(engine.run({"x": feature_NF})["y"])


def logits(
    feature: dict[str, Array], label_N: Array, learned_N: Array, seed: int
) -> Iterator[tuple[str, Array]]:
    """Precision and logits of all pictures, by one head that learned from some."""
    x = feature["float"]
    weight, bias = head(x[learned_N], label_N[learned_N], seed)
    yield "float", x @ weight.T + bias
    yield "int8", int8_logits(weight, bias, x[learned_N], feature["int8"])


def ece(logits_NC: Array, label_N: Array) -> float:
    return ClassificationMetrics.of(logits_NC, label_N).compute()["ece"]


def least_ece(logits_NC: Array, seed: int) -> float:
    """The mean ece of labels that are drawn by the very probabilities: what chance alone makes."""
    p_NC = np.exp(logits_NC - np.logaddexp.reduce(logits_NC, axis=1, keepdims=True))
    drawn_DN = np.random.default_rng(seed).random((DRAWS, len(p_NC)))
    labels = ((p_NC.cumsum(1) < each[:, None]).sum(1) for each in drawn_DN)
    return float(np.mean([ece(logits_NC, label.clip(max=p_NC.shape[1] - 1)) for label in labels]))


def calibration(feature: dict[str, Array], label_N: Array, seed: int) -> None:
    part_N = stratified(label_N, np.random.default_rng(seed))
    shape = (len(label_N), int(label_N.max()) + 1)
    before = {precision: np.zeros(shape) for precision in PRECISIONS}
    after = {precision: np.zeros(shape) for precision in PRECISIONS}
    for part in range(PARTS):
        judged, fitted = part_N == part, part_N == (part + 1) % PARTS
        for precision, found in logits(feature, label_N, ~(judged | fitted), seed):
            known, _ = Confidence.fit(found[fitted], label_N[fitted])
            before[precision][judged] = found[judged]
            after[precision][judged] = known.log_probabilities(found[judged])
    for precision in PRECISIONS:
        top1 = (before[precision].argmax(1) == label_N).mean()
        click.echo(
            f"ece, seed {seed}, {precision}: {ece(before[precision], label_N):.4f} before, "
            f"{ece(after[precision], label_N):.4f} after (calibrated to the last, it would be "
            f"{least_ece(after[precision], seed):.4f} on so many pictures), top-1 {top1:.4f}"
        )


def sets(feature: dict[str, Array], label_N: Array, splits: int) -> None:
    covered: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    sizes: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for split in range(splits):
        part_N = stratified(label_N, np.random.default_rng(1000 + split))
        fitted, judged = part_N == 0, part_N == 1
        for precision, found in logits(feature, label_N, part_N > 1, split):
            known, _ = Confidence.fit(found[fitted], label_N[fitted])
            in_set = np.exp(known.log_probabilities(found[judged])) >= known.limit
            covered[precision].append(in_set[np.arange(judged.sum()), label_N[judged]].mean())
            sizes[precision].append(in_set.sum(1).mean())
    for precision in PRECISIONS:
        share = np.array(covered[precision])
        click.echo(
            f"coverage of 0.9 over {splits} splits, {precision}: {share.mean():.4f} "
            f"(sd {share.std(ddof=1):.4f}, {share.min():.3f} to {share.max():.3f}), "
            f"set size {np.mean(sizes[precision]):.3f}"
        )


def unknown(feature: dict[str, Array], label_N: Array, num: int, draws: int) -> None:
    found: dict[str, list[tuple[float, float, float]]] = {p: [] for p in PRECISIONS}
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        left_out = np.isin(label_N, rng.choice(int(label_N.max()) + 1, num, replace=False))
        part_N = np.where(left_out, -1, stratified(label_N, rng))
        kinds = np.unique(label_N[~left_out])
        own_N = np.searchsorted(kinds, label_N)
        fitted, judged = part_N == 0, part_N == 1
        for precision, logits_NC in logits(feature, own_N, part_N > 1, draw):
            known, border = Confidence.fit(logits_NC[fitted], own_N[fitted])
            unlike = known.unlikeness(known.log_probabilities(logits_NC))
            curve = of_scores(unlike[left_out], unlike[judged])
            called = unlike >= border.value
            found[precision].append((curve.auroc, called[left_out].mean(), called[judged].mean()))
    for precision in PRECISIONS:
        auroc, caught, false = np.array(found[precision]).T
        click.echo(
            f"{num} kinds unknown, {draws} draws, {precision}: AUROC {auroc.mean():.4f} "
            f"(sd {auroc.std(ddof=1):.4f}, {auroc.min():.3f} to {auroc.max():.3f}; the first three "
            f"{', '.join(f'{a:.3f}' for a in auroc[:3])}); at its border {caught.mean():.3f} of "
            f"them and {false.mean():.3f} of known pictures are called unknown"
        )


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option("--features", "store", type=click.Path(path_type=Path), help="Kept between runs.")
@click.option("--unknown", "num_unknown", default=4, show_default=True, help="Kinds left out.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--splits", default=20, show_default=True)
def main(
    bundle: Path, data: Path, store: Path | None, num_unknown: int, seeds: int, splits: int
) -> None:
    """Print every figure."""
    torch.set_num_threads(1)
    paths = pictures(data)
    _, label_N = np.unique([path.parent.name for path in paths], return_inverse=True)
    if store is not None and store.exists():
        with np.load(store) as kept:
            feature = {precision: kept[precision] for precision in PRECISIONS}
    else:
        feature = {precision: features(bundle, paths, precision) for precision in PRECISIONS}
        if store is not None:
            np.savez(store, **feature)
    click.echo(f"{len(paths)} pictures of {label_N.max() + 1} classes")
    for seed in range(seeds):
        calibration(feature, label_N, seed)
    sets(feature, label_N, splits)
    unknown(feature, label_N, num_unknown, splits)


if __name__ == "__main__":
    main()
