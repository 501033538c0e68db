from __future__ import annotations

import copy
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engineworks.export.systems.backbone import trace_backbone
from engineworks.export.systems.noising import graphs
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.engines import BACKENDS
from engineworks.runtime.errors import BundleError, ConfigError
from engineworks.runtime.systems import backbone as system
from engineworks.runtime.tensors import Array, Feeds
from engineworks.runtime.testing import write_flowers, write_parts, write_tiny_noising_bundle
from engineworks.training import backbones, features
from engineworks.training.config import BackboneConfig, load_config
from engineworks.training.features import EngineBackbone, FeatureCache, FeatureStore, content_key
from engineworks.training.systems.paco.eager import trained_net
from engineworks.training.systems.refdet.config import DetectorConfig, EncoderConfig
from engineworks.training.systems.refdet.model import RefDet
from engineworks.training.train import train
from tests.runtime.nets import as_plan

pytestmark = pytest.mark.train

CUT = BackboneConfig(name="resnet10t", stages=(1, 2), weights="none")
WHOLE = BackboneConfig(name="test_vit", weights="none")
SIZE = (64, 64)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return trace_backbone(CUT, tmp_path_factory.mktemp("cut") / "bundle", size=SIZE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return trace_backbone(WHOLE, tmp_path_factory.mktemp("whole") / "bundle", size=SIZE)


def images(num: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def by(bundle: Bundle, config: BackboneConfig, **changes: Any) -> BackboneConfig:
    return config.model_copy(update={"engine": str(bundle.root), **changes})


class TestAnEngineInThePlaceOfANet:
    @pytest.mark.parametrize("backend", ["ort", "openvino"])
    def test_gives_the_maps_of_the_eager_net(self, backend: str, cut: Bundle) -> None:
        eager = backbones.create(CUT)
        made = backbones.create(by(cut, CUT, engine_backend=backend))
        assert isinstance(made.net, EngineBackbone)
        assert made.channels == eager.channels
        with torch.no_grad():
            wants = eager.net.eval()(images(3))
        for got, want in zip(made.net(images(3)), wants, strict=True):
            assert got.shape == want.shape
            assert got.dtype == torch.float32
            # float32 sums in another order
            assert (got - want).abs().max() < 1e-4 * want.abs().max()

    def test_gives_the_class_token_beside_the_map(self, whole: Bundle) -> None:
        eager, made = backbones.create(WHOLE, size=SIZE), backbones.create(by(whole, WHOLE))
        assert isinstance(eager.net, backbones.LastMap)
        assert isinstance(made.net, EngineBackbone)
        assert made.net.has_token
        assert made.net.channels == eager.net.channels
        with torch.no_grad():
            wants = eager.net.eval().token_and_map(images())
        for got, want in zip(made.net.token_and_map(images()), wants, strict=True):
            assert got is not None
            assert want is not None
            assert (got - want).abs().max() < 1e-4 * want.abs().max()  # as above

    def test_has_the_weights_of_the_eager_net_under_its_names(self, cut: Bundle) -> None:
        eager, made = backbones.create(CUT), backbones.create(by(cut, CUT, weights="hub"))
        wants = eager.net.state_dict()
        assert list(made.net.state_dict()) == list(wants)
        for name, value in made.net.state_dict().items():
            assert torch.equal(value, wants[name])

    def test_takes_part_in_no_gradient(self, cut: Bundle) -> None:
        net = backbones.create(by(cut, CUT)).net
        x = images().requires_grad_()
        assert not any(found.requires_grad for found in net(x))
        assert not any(p.requires_grad for p in net.parameters())

    def test_takes_images_that_lie_otherwise_in_memory(self, cut: Bundle) -> None:
        net = backbones.create(by(cut, CUT)).net
        laid_out = images().to(memory_format=torch.channels_last)
        for got, want in zip(net(laid_out), net(images()), strict=True):
            assert torch.equal(got, want)

    def test_is_shared_by_copies_of_the_module(self, cut: Bundle) -> None:
        net = backbones.create(by(cut, CUT)).net
        for got, want in zip(copy.deepcopy(net)(images()), net(images()), strict=True):
            assert torch.equal(got, want)

    def test_says_where_its_weights_came_from_and_what_runs_it(self, cut: Bundle) -> None:
        made = backbones.create(by(cut, CUT, engine_backend="ort"))
        assert made.provenance["engine"] == "ort, float"
        assert made.provenance["engine_digest"] == cut.manifest.digest
        eager = backbones.create(CUT).provenance
        assert made.provenance["tensors_sha256"] == eager["tensors_sha256"]
        assert made.provenance["weights"] == "random, seed 0"

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"name": "resnet18"}, "has net resnet10t, the configuration resnet18"),
            ({"stages": (2,)}, r"has stages \(1, 2\), the configuration \(2,\)"),
            ({"args": {"output_stride": 16}}, "has args"),
        ],
    )
    def test_must_be_of_the_net_that_is_configured(
        self, changes: dict[str, Any], message: str, cut: Bundle
    ) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            backbones.create(by(cut, CUT, **changes))
        assert "cli.py export backbone:" in str(caught.value.fix)

    def test_must_be_of_the_size_of_the_images(self, cut: Bundle) -> None:
        with pytest.raises(ConfigError, match=r"has size \(64, 64\), the configuration \(96, 96\)"):
            backbones.create(by(cut, CUT), size=(96, 96))

    def test_must_be_a_bundle_of_a_backbone(self, tmp_path: Path) -> None:
        other = write_tiny_noising_bundle(tmp_path / "bundle")
        with pytest.raises(ConfigError, match="a bundle of 'noising'"):
            backbones.create(by(other, CUT))
        with pytest.raises(BundleError, match="is no bundle"):
            backbones.create(CUT.model_copy(update={"engine": str(tmp_path)}))

    def test_leaves_nothing_to_compile(self) -> None:
        with pytest.raises(ValueError, match="takes the place of checkpointing and compile"):
            BackboneConfig(name="resnet10t", engine="bundle", compile=True)


class Recorder:
    """An engine that remembers how many images it got at once."""

    backend = "tensorrt"

    def __init__(self, function: Callable[[Array], Mapping[str, Array]]) -> None:
        self.function = function
        self.sizes: list[int] = []

    def run(self, feeds: Feeds, *, stream: int | None = None) -> dict[str, Array]:
        (batch,) = feeds.values()
        assert isinstance(batch, np.ndarray)
        self.sizes.append(len(batch))
        return dict(self.function(batch))


class TestAPlan:
    def test_gets_batches_in_pieces_that_its_profile_takes(self, cut: Bundle) -> None:
        net = backbones.create(by(cut, CUT)).net
        assert isinstance(net, EngineBackbone)
        engine: Any = Recorder(lambda x: dict.fromkeys(("stage1", "stage2"), 2 * x))
        net._lent = features._Lent({"features": engine})
        net._largest_batch = 4
        x = images(10)
        for found in net(x):
            assert torch.equal(found, 2 * x)
        assert engine.sizes == [4, 4, 2]

    @pytest.mark.parametrize(
        ("profiles", "largest"), [([], 32), ([{"batch": [1, 2, 4]}, {"batch": [1, 8, 16]}], 16)]
    )
    def test_says_in_the_manifest_how_many_it_takes(
        self, profiles: list[Any], largest: int, cut: Bundle
    ) -> None:
        origin = {
            "source": "float",
            "source_sha256": "",
            "machine": {"tensorrt": "10", "platform": "linux"},
            "config": {"profiles": profiles},
        }
        record = {**cut.manifest.provenance, "plans": {"features": {"float-plan": origin}}}
        planned = Bundle(cut.root, cut.manifest.model_copy(update={"provenance": record}))
        assert features._largest_batch(planned, "tensorrt", "float") == largest
        assert features._largest_batch(planned, "ort", "float") is None


@pytest.mark.gpu
class TestOnAGpu:
    def test_images_stay_there_and_the_current_stream_is_kept(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("PyTorch sees no CUDA device")
        if reason := BACKENDS["tensorrt"].why_not():
            pytest.skip(reason)
        from engineworks.runtime.engines import open_engine
        from tests.runtime.nets import conv_net, conv_net_in_float64

        model, weights = conv_net()
        net = EngineBackbone.__new__(EngineBackbone)
        nn.Module.__init__(net)
        engine: Any = _Renamed(open_engine(as_plan(model), "tensorrt"))
        net._lent = features._Lent({"features": engine})
        net._maps, net._largest_batch = ["y"], 4
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            long = torch.rand(2048, 2048, device="cuda") @ torch.rand(2048, 2048, device="cuda")
            x = torch.rand(10, 3, 10, 10, device="cuda") + 0 * long[0, 0]
            (y,) = net(x)
            assert y.is_cuda
            want = conv_net_in_float64(x.cpu().numpy(), weights)
            # sums of 27 and 32 float32 products: a few 1e-7 of the largest
            np.testing.assert_allclose(y.cpu(), want, rtol=0, atol=1e-5 * np.abs(want).max())


class _Renamed:
    """An engine whose input is called ``images``."""

    def __init__(self, engine: Any) -> None:
        self.backend, self._engine = engine.backend, engine

    def run(self, feeds: Feeds, *, stream: int | None = None) -> Any:
        return self._engine.run({"x": feeds["images"]}, stream=stream)


# --- a run that an engine made -------------------------------------------------------------------


class TestARunByAnEngine:
    def test_of_noising_is_exported_as_the_eager_one_is(self, cut: Bundle, tmp_path: Path) -> None:
        data = write_parts(tmp_path / "data", num_train=4, num_good=1, num_defective=1)
        runs = {}
        for name, engine in (("eager", None), ("engine", str(cut.root))):
            AcceleratorState._reset_state(reset_partial_state=True)
            settings = [f"backbone.{key}={value}" for key, value in _tree(CUT).items()]
            settings += [f"backbone.engine={engine or 'null'}", "preprocess.size=[64, 64]"]
            settings += ["train.device=cpu", "fit.max_rows=64"]
            config = load_config("noising", None, settings)
            runs[name] = train(config, data, tmp_path / name)
        assert runs["engine"].info.provenance["engine_digest"] == cut.manifest.digest
        want, got = (backbones.read_weights(run.weights()) for run in runs.values())
        assert want.keys() == got.keys()
        assert all(torch.equal(want[name], got[name]) for name in want)
        borders = [json.loads((run.root / "thresholds.json").read_text()) for run in runs.values()]
        for name, border in borders[0].items():
            # features differ by float32 rounding, and so may which rows the bank took
            assert borders[1][name]["value"] == pytest.approx(border["value"], rel=0.05)
        exported = graphs(runs["engine"].root)["features"].module  # without the engine
        with torch.no_grad():
            want = graphs(runs["eager"].root)["features"].module(images())
            assert torch.equal(exported(images()), want)

    def test_of_paco_is_a_linear_probe_and_nothing_else(
        self, whole: Bundle, tmp_path: Path
    ) -> None:
        data = write_flowers(tmp_path / "data", num_train=2, num_test=1)
        settings = [f"backbone.{key}={value}" for key, value in _tree(WHOLE).items()]
        settings += ["preprocess.size=[64, 64]", "train.device=cpu", "train.epochs=1"]
        settings += [f"backbone.engine={whole.root}", f"backbone.store={tmp_path / 'store'}"]
        with pytest.raises(ConfigError, match="cannot learn, and frozen is false"):
            train(load_config("paco", None, settings), data, tmp_path / "run")
        runs = []
        for name in ("first", "again"):
            AcceleratorState._reset_state(reset_partial_state=True)
            config = load_config("paco", None, [*settings, "frozen=true"])
            runs.append(train(config, data, tmp_path / name))
        assert runs[0].info.results == runs[1].info.results
        assert len(list((tmp_path / "store").glob("??/*.npy"))) == 6 * (2 + 1)
        assert trained_net(runs[0])(images())[0].shape == (2, 6)  # without the engine

    def test_of_refdet_sees_its_references_through_the_engine(
        self, whole: Bundle, tmp_path: Path
    ) -> None:
        encoder = EncoderConfig(name="test_vit", weights="none", engine=str(whole.root))
        detector = DetectorConfig(width=0.125, scales=(3, 4), reg_max=4)
        eager, engined = (
            RefDet(config, detector, 0, reference_size=SIZE)
            for config in (encoder.plain(), encoder)
        )
        engined.load_state_dict(eager.state_dict())
        with torch.no_grad():
            want, got = (net.eval().encoder.features(images(3)) for net in (eager, engined))
        # float32 sums in another order, of vectors of length 1
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        with pytest.raises(ConfigError, match=r"encoder\.train_blocks is all"):
            learning = encoder.model_copy(update={"train_blocks": "all"})
            RefDet(learning, detector, 0, reference_size=SIZE)


def _tree(config: BackboneConfig) -> dict[str, Any]:
    stages = None if config.stages is None else list(config.stages)
    return {"name": config.name, "weights": config.weights, "stages": stages or "null"}


# --- what was computed once ----------------------------------------------------------------------


class Encoder:
    """Doubles the first values of a picture, and remembers how many it was given at once."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pictures_BCHW: Tensor) -> Tensor:
        self.batches.append(len(pictures_BCHW))
        return 2 * pictures_BCHW.flatten(1)[:, :4]


def pictures(num: int) -> Tensor:
    return torch.randn(num, 3, 2, 2, generator=torch.Generator().manual_seed(1))


class TestACache:
    def test_has_a_picture_encoded_once_whatever_it_is_called(self) -> None:
        encode, cache, x = Encoder(), FeatureCache(2**20), pictures(3)
        first = cache.features(encode, x[[0, 1, 0]])
        again = cache.features(encode, x[[1, 2]].clone())
        assert torch.equal(first, 2 * x.flatten(1)[[0, 1, 0], :4])
        assert torch.equal(again, 2 * x.flatten(1)[[1, 2], :4])
        assert (cache.hits, cache.misses) == (2, 3)

    def test_keeps_what_does_not_depend_on_what_else_was_new(self) -> None:
        encode = Encoder()
        FeatureCache(2**20).features(encode, pictures(3))
        assert encode.batches == [1, 1, 1]

    def test_drops_the_least_recently_used(self) -> None:
        encode, cache, x = Encoder(), FeatureCache(2 * 4 * 4), pictures(3)  # two rows of float32
        cache.features(encode, x[:2])
        cache.features(encode, x[[0, 2]])  # the second goes
        assert cache.num_bytes == 32
        cache.features(encode, x[[0, 2]])
        assert (cache.hits, cache.misses) == (3, 3)
        cache.features(encode, x[1:2])
        assert cache.misses == 4

    def test_without_room_keeps_nothing(self) -> None:
        cache = FeatureCache(0)
        for _ in range(2):
            cache.features(Encoder(), pictures(1))
        assert (cache.hits, cache.num_bytes) == (0, 0)

    def test_keeps_no_gradient(self) -> None:
        weight = torch.ones(12, requires_grad=True)
        cache = FeatureCache(2**20)
        for _ in range(2):
            assert not cache.features(lambda p: p.flatten(1) * weight, pictures(1)).requires_grad

    def test_finds_on_disk_what_another_one_computed(self, tmp_path: Path) -> None:
        first, second = Encoder(), Encoder()
        rows = []
        for encode in (first, second):
            store = FeatureStore(tmp_path, 2**20)
            cache = FeatureCache(2**20, store=store, net=lambda: "a net")
            rows.append(cache.features(encode, pictures(3)))
        assert torch.equal(*rows)
        assert (len(first.batches), len(second.batches)) == (3, 0)
        assert (cache.hits, cache.misses) == (3, 0)

    def test_does_not_take_what_another_net_said(self, tmp_path: Path) -> None:
        encode, store = Encoder(), FeatureStore(tmp_path, 2**20)
        for name in ("a", "b"):
            FeatureCache(0, store=store, net=str(name).strip).features(encode, pictures(1))
        assert len(encode.batches) == 2

    def test_of_a_frozen_net_knows_its_weights(self, tmp_path: Path) -> None:
        config = CUT.model_copy(update={"store": str(tmp_path)})
        for seed, misses in ((0, 1), (0, 0), (1, 1)):
            net = backbones.create(config, seed=seed).net.eval()
            cache = backbones.feature_cache(config, net, max_bytes=0)
            cache.features(partial(_mean, net), images(1))
            assert cache.misses == misses


def _mean(net: nn.Module, images_BCHW: Tensor) -> Tensor:
    mean_BC: Tensor = net(images_BCHW)[0].mean((2, 3))
    return mean_BC


class TestTheKeyOfAPicture:
    @given(st.integers(0, 2**32 - 1), st.integers(0, 11))
    @settings(max_examples=30, deadline=None)
    def test_changes_with_any_value_and_with_nothing_else(self, seed: int, place: int) -> None:
        x = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(seed))
        other = x.clone()
        assert content_key(x) == content_key(other)
        strided = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        assert content_key(strided) == content_key(x)
        bits = other.flatten().view(torch.int32)
        bits[place] ^= 1  # the least that can change
        assert content_key(x) != content_key(other)

    def test_changes_with_the_shape(self) -> None:
        x = torch.zeros(3, 2, 4)
        assert content_key(x) != content_key(x.view(3, 4, 2))
        assert content_key(x) != content_key(x.view(torch.int32))


def size_of(root: Path) -> int:
    return sum(path.stat().st_size for path in root.glob("??/*.npy"))


class TestAStore:
    @given(
        values=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 40)), min_size=1, max_size=40)
    )
    @example(
        values=[(0, 1), (2, 1), (3, 26), (4, 40), (1, 1), (1, 23)]
    )  # one makes room for its successor
    @settings(max_examples=25, deadline=None)
    def test_never_holds_more_than_it_may_and_never_anything_else(
        self, values: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        root = tmp_path_factory.mktemp("store")
        store, kept = FeatureStore(root, 1000), dict[str, Array]()
        for number, width in values:
            name = f"{number:02d}"
            kept[name] = np.full(width, number + width / 100, np.float32)
            store.put(name, kept[name])
            assert size_of(root) <= 1000
            assert int((root / "size").read_text()) == size_of(root)
            for known, want in kept.items():
                found = store.get(known)
                if found is not None:
                    np.testing.assert_array_equal(found, want)
            last = store.get(name)
            assert last is not None  # 128 bytes of header and at most 160 of values fit

    def test_keeps_what_was_used_last(self, tmp_path: Path) -> None:
        store = FeatureStore(tmp_path, 3 * (128 + 40))
        for name in ("aa", "bb", "cc"):
            store.put(name, np.zeros(10, np.float32))
            time.sleep(0.02)  # more than the clock of files ticks
        store.get("aa")
        store.put("dd", np.zeros(10, np.float32))
        assert store.get("aa") is not None
        assert store.get("bb") is None

    def test_gives_arrays_that_are_mapped_and_cannot_be_written(self, tmp_path: Path) -> None:
        store = FeatureStore(tmp_path, 2**20)
        store.put("aa", np.arange(6, dtype=np.float32).reshape(2, 3))
        found = store.get("aa")
        assert isinstance(found, np.memmap)
        assert not found.flags.writeable

    def test_does_not_keep_what_is_larger_than_itself(self, tmp_path: Path) -> None:
        store = FeatureStore(tmp_path, 200)
        store.put("aa", np.zeros(100, np.float32))
        assert store.get("aa") is None
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    @pytest.mark.parametrize("length", [0, 20, 140])
    def test_takes_a_file_that_was_cut_short_for_none(self, length: int, tmp_path: Path) -> None:
        store = FeatureStore(tmp_path, 2**20)
        store.put("aa", np.arange(10, dtype=np.float32))
        (file,) = tmp_path.glob("??/*.npy")
        file.write_bytes(file.read_bytes()[:length])
        assert store.get("aa") is None
        store.put("aa", np.ones(3, np.float32))
        np.testing.assert_array_equal(store.get("aa"), np.ones(3))

    def test_is_shared_by_processes(self, tmp_path: Path) -> None:
        context = multiprocessing.get_context("fork")
        workers = [context.Process(target=_fill, args=(tmp_path, first)) for first in (0, 20)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0]
        assert size_of(tmp_path) == int((tmp_path / "size").read_text()) <= 5000
        assert not list(tmp_path.glob(".*"))


def _fill(root: Path, first: int) -> None:
    store = FeatureStore(root, 5000)
    for number in range(first, first + 40):
        store.put(f"{number:02d}", np.full(50, number, np.float32))
        found = store.get(f"{number:02d}")
        assert found is None or (found == number).all()


def test_the_names_of_maps_leave_out_the_token(whole: Bundle) -> None:
    assert system.map_names(whole.manifest) == ["map"]
