from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engineworks.runtime.bundle import sha256_file
from engineworks.runtime.errors import ConfigError, WeightsError
from engineworks.training import backbones
from engineworks.training.config import BackboneConfig

pytestmark = pytest.mark.train

# a few milliseconds each; between them every way in which timm wraps a net
NETS = [
    ("resnet10t", (1, 2), {}),
    ("mobilenetv3_small_050", (1, 2), {}),
    ("mobilenetv2_050", (0, 2), {"pad_type": "same"}),
    ("convnext_atto", (0, 1), {}),
    ("densenet121", (1,), {}),
]


def whole_net(name: str, **args: Any) -> nn.Module:
    """The net as timm has it, with statistics and biases that are not the initial ones."""
    torch.manual_seed(3)
    net: nn.Module = timm.create_model(name, **args).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return net


def timms_own(name: str, stages: tuple[int, ...], file: Path, args: dict[str, Any]) -> list[Tensor]:
    """What timm computes when it loads the file itself."""
    net = timm.create_model(
        name,
        features_only=True,
        out_indices=stages,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(file), "num_classes": 1000},
        **args,
    )
    with torch.no_grad():
        maps: list[Tensor] = net.eval()(images())
    return maps


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def maps_of(net: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        maps: list[Tensor] = net.eval()(images())
    return maps


class TestWeightsFromAFile:
    @pytest.mark.parametrize(("name", "stages", "args"), NETS, ids=[n[0] for n in NETS])
    def test_give_the_maps_that_timm_computes(
        self, name: str, stages: tuple[int, ...], args: dict[str, Any], tmp_path: Path
    ) -> None:
        file = tmp_path / "net.safetensors"
        save_file(whole_net(name, **args).state_dict(), file)
        made = backbones.create(
            BackboneConfig(name=name, stages=stages, weights=str(file), args=args)
        )
        got, want = maps_of(made.net), timms_own(name, stages, file, args)
        assert [tuple(m.shape) for m in got] == [tuple(m.shape) for m in want]
        assert made.channels == tuple(m.shape[1] for m in got)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_050"])
    def test_may_have_their_norms_folded_into_the_convolutions(
        self, name: str, tmp_path: Path
    ) -> None:
        net = whole_net(name)
        file, folded_file = tmp_path / "net.safetensors", tmp_path / "folded.safetensors"
        save_file(net.state_dict(), file)
        save_file(folded(net), folded_file)
        got, want = (
            maps_of(
                backbones.create(BackboneConfig(name=name, stages=(1, 2), weights=str(path))).net
            )
            for path in (folded_file, file)
        )
        for a, b in zip(got, want, strict=True):
            # float32 weights were rounded once more by folding them
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_need_only_hold_the_chosen_stages(self, tmp_path: Path) -> None:
        file = tmp_path / "net.safetensors"
        state = whole_net("resnet10t").state_dict()
        save_file({k: v for k, v in state.items() if not k.startswith(("layer4", "fc"))}, file)
        chosen = BackboneConfig(name="resnet10t", stages=(2, 3), weights=str(file))
        assert backbones.create(chosen).channels == (128, 256)
        with pytest.raises(WeightsError, match=r"layer4\.0\.conv1\.weight is missing") as caught:
            backbones.create(chosen.model_copy(update={"stages": (3, 4)}))
        assert "other stages" in (caught.value.fix or "")

    def test_of_another_net_are_refused_with_both_shapes(self, tmp_path: Path) -> None:
        file = tmp_path / "net.safetensors"
        state = whole_net("resnet10t").state_dict()
        state["conv1.0.weight"] = torch.zeros(24, 1, 3, 3)
        save_file(state, file)
        with pytest.raises(WeightsError, match=r"conv1\.0\.weight \(24, 1, 3, 3\) instead of"):
            backbones.create(BackboneConfig(name="resnet10t", stages=(1,), weights=str(file)))

    def test_that_are_missing_are_named(self) -> None:
        with pytest.raises(WeightsError, match=r"no weights file nowhere\.safetensors"):
            backbones.create(
                BackboneConfig(name="resnet10t", stages=(1,), weights="nowhere.safetensors")
            )

    @pytest.mark.parametrize("content", [b"", b"not tensors", b"\x10" + bytes(7) + b"{}"])
    def test_that_are_corrupt_are_refused(self, content: bytes, tmp_path: Path) -> None:
        file = tmp_path / "net.safetensors"
        file.write_bytes(content)
        with pytest.raises(WeightsError, match="not a whole safetensors file"):
            backbones.create(BackboneConfig(name="resnet10t", stages=(1,), weights=str(file)))

    def test_are_recorded_with_their_hash(self, tmp_path: Path) -> None:
        file = tmp_path / "net.safetensors"
        save_file(whole_net("resnet10t").state_dict(), file)
        made = backbones.create(BackboneConfig(name="resnet10t", stages=(1,), weights=str(file)))
        assert made.provenance["weights"] == "net.safetensors"
        assert made.provenance["sha256"] == sha256_file(file)


class TestTheLastMapOfAWholeNet:
    @pytest.mark.parametrize(
        ("name", "args", "size"),
        [
            ("resnet10t", {}, 64),
            ("mobilenetv3_small_050", {}, 64),  # its head has a convolution of its own
            ("mobilenetv2_050", {"pad_type": "same"}, 64),
            ("convnext_atto", {}, 64),  # its last norm belongs to the head
            ("vit_tiny_patch16_224", {"img_size": 64}, 64),
            ("vit_tiny_patch16_dinov3_qkvb", {}, 64),  # 4 register tokens beside the class token
            ("swin_s3_tiny_224", {"img_size": 96, "window_size": 3}, 96),  # channels last
        ],
    )
    def test_is_what_timm_computes_and_nothing_is_left_over(
        self, name: str, args: dict[str, Any], size: int, tmp_path: Path
    ) -> None:
        net: Any = whole_net(name, **args)
        save_file(net.state_dict(), tmp_path / "weights.safetensors")
        config = BackboneConfig(name=name, args=args, weights=str(tmp_path / "weights.safetensors"))
        made = backbones.create(config)
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        made.net.eval()
        (got,) = made.net(x)
        with torch.no_grad():
            want = net.forward_features(x)
        if want.ndim == 3:  # (B, tokens, C), in rows of patches
            want = want[:, net.num_prefix_tokens :]
            assert got.flatten(2).shape[2] == want.shape[1]
            want = want.transpose(1, 2).reshape(got.shape)
        elif want.shape[3] == made.channels[0]:
            want = want.permute(0, 3, 1, 2)
        assert got.shape[1] == made.channels[0]
        # the same operations on the same numbers
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        got.sum().backward()
        assert [key for key, p in made.net.named_parameters() if p.grad is None] == []


class TestWhatTheConfigurationMayAskFor:
    def test_checkpointing_changes_no_number(self) -> None:
        results = []
        for checkpointing in (False, True):
            config = BackboneConfig(name="resnet10t", weights="none", checkpointing=checkpointing)
            net = backbones.create(config).net
            (last,) = net(images())
            last.square().sum().backward()
            results.append([p.grad for p in net.parameters()])
        for got, want in zip(*results, strict=True):
            assert got is not None
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)  # sums in another order

    def test_checkpointing_that_a_net_has_not_is_an_error(self) -> None:
        config = BackboneConfig(name="dla34", weights="none", checkpointing=True)
        with pytest.raises(ConfigError, match="checkpointing"):
            backbones.create(config)

    def test_channels_last_keeps_the_weights_in_that_layout(self) -> None:
        config = BackboneConfig(name="resnet10t", weights="none", channels_last=True)
        net = backbones.create(config).net
        convolution = next(
            m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3
        )
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)

    def test_frozen_norms_keep_their_statistics_and_still_learn(self) -> None:
        config = BackboneConfig(name="resnet10t", weights="none", frozen_norms=True)
        net = backbones.create(config).net.train()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        (last,) = net(images())
        last.sum().backward()
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0)
        assert all(p.grad is not None for p in net.parameters())
        assert net.training

    def test_frozen_norms_are_for_whole_nets(self) -> None:
        with pytest.raises(ValueError, match="stages must be null"):
            BackboneConfig(name="resnet10t", stages=(1,), frozen_norms=True)

    def test_compiling_leaves_the_names_of_the_weights_alone(self) -> None:
        config = BackboneConfig(name="resnet10t", weights="none")
        names = backbones.create(config).net.state_dict().keys()
        compiled = backbones.create(config.model_copy(update={"compile": True})).net
        assert compiled.state_dict().keys() == names


class TestWeightsFromTheHub:
    @pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("no such tag")])
    def test_that_cannot_be_reached_are_no_quiet_random_numbers(
        self, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(*_: Any, pretrained: bool, **__: Any) -> None:
            if pretrained:  # the net itself can be made
                raise error

        monkeypatch.setattr(timm, "create_model", unreachable)
        with pytest.raises(WeightsError, match="cannot be fetched: no ") as caught:
            backbones.create(BackboneConfig(name="resnet18", stages=(1,)))
        assert "backbone.weights=FILE" in (caught.value.fix or "")


class TestRandomWeights:
    def test_follow_from_the_seed_alone(self) -> None:
        chosen = BackboneConfig(name="resnet10t", stages=(1,), weights="none")
        before = torch.get_rng_state()
        first, again, other = (backbones.create(chosen, seed=s).provenance for s in (1, 1, 2))
        assert first == again
        assert first["tensors_sha256"] != other["tensors_sha256"]
        assert first["weights"] == "random, seed 1"
        assert torch.equal(torch.get_rng_state(), before)


class TestTheBlocksOfATransformer:
    @pytest.mark.parametrize("norm", [False, True])
    @pytest.mark.parametrize(
        ("name", "size", "patch"),
        [
            ("vit_small_patch16_dinov3", (32, 64), 16),  # a class token and four registers, RoPE
            ("vit_small_patch14_dinov2", (28, 42), 14),
            ("vit_small_patch14_reg4_dinov2", (42, 28), 14),
        ],
    )
    def test_are_its_patches_without_what_stands_before_them(
        self, name: str, size: tuple[int, int], patch: int, *, norm: bool, tmp_path: Path
    ) -> None:
        """Against the whole net, whose blocks are listened to."""
        whole: Any = timm.create_model(name, num_classes=0).eval()
        for parameter in whole.parameters():
            if parameter.std() == 0:  # norms, biases and scales as training leaves them
                nn.init.uniform_(parameter, 0.5, 1.5)
        save_file(whole.state_dict(), tmp_path / "net.safetensors")
        config = BackboneConfig(
            name=name, stages=(1, 3), weights=str(tmp_path / "net.safetensors"), norm=norm
        )
        made = backbones.create(config, size=size)
        h, w = size[0] // patch, size[1] // patch
        assert (made.channels, made.grids) == ((384, 384), ((h, w), (h, w)))
        whole.set_input_size(img_size=size)
        heard: dict[int, Tensor] = {}
        for i in (1, 3):
            whole.blocks[i].register_forward_hook(lambda _m, _x, y, i=i: heard.update({i: y}))
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            whole.forward_features(x)
            got = made.net.eval()(x)
            for map_BCHW, tokens_BNC in zip(got, heard.values(), strict=True):
                if norm:
                    tokens_BNC = whole.norm(tokens_BNC)
                want = tokens_BNC[:, -h * w :].unflatten(1, (h, w)).permute(0, 3, 1, 2)
                # the same operations on the same numbers
                torch.testing.assert_close(map_BCHW, want, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("name", "stages"), [("resnet10t", (1,)), ("swin_s3_tiny_224", (0, 1))]
    )
    def test_alone_have_a_norm_for_all(self, name: str, stages: tuple[int, ...]) -> None:
        config = BackboneConfig(name=name, stages=stages, weights="none", norm=True)
        with pytest.raises(ConfigError, match="no last norm"):
            backbones.create(config)
        with pytest.raises(ValueError, match="norm is for chosen stages"):
            BackboneConfig(name=name, norm=True)


class TestMapsAreWhatTheyAreSaidToBe:
    @pytest.mark.parametrize(
        ("name", "stages", "size"),
        [
            ("test_mambaout", (1, 2), (256, 192)),  # C = h of a map: its shape does not tell
            ("test_mambaout", None, (64, 96)),
            ("swin_s3_tiny_224", (0, 1), (64, 96)),  # made for another size
            ("test_vit3", (0, 8), (64, 48)),  # four register tokens beside the patches
            ("test_vit", (2, 5), (64, 48)),
            ("test_maxvit", (1, 2), (96, 64)),
        ],
    )
    def test_a_change_in_the_picture_shows_where_it_is(
        self, name: str, stages: tuple[int, ...] | None, size: tuple[int, int]
    ) -> None:
        made = backbones.create(BackboneConfig(name=name, stages=stages, weights="none"), size=size)
        height, width = size
        plain = torch.zeros(1, 3, *size)
        changed = plain.clone()
        changed[:, :, height // 4 : height // 2, width // 2 : 3 * width // 4] = 3
        with torch.no_grad():
            pairs = zip(made.net.eval()(plain), made.net(changed), strict=True)
            found = [(after - before).abs().sum(1)[0] for before, after in pairs]
        assert [tuple(m.shape) for m in found] == list(made.grids)
        for difference_HW, (h, w) in zip(found, made.grids, strict=True):
            y, x = divmod(int(difference_HW.argmax()), w)
            # a cell of tolerance: convolutions and attention spread what changed
            assert h // 4 - 1 <= y <= h // 2
            assert w // 2 - 1 <= x <= 3 * w // 4

    @pytest.mark.parametrize("stages", [(2, 5), None])
    def test_patches_that_leave_a_strip_unseen_are_refused(
        self, stages: tuple[int, ...] | None
    ) -> None:
        config = BackboneConfig(
            name="test_vit", stages=stages, weights="none", args={"patch_size": 20}
        )
        with pytest.raises(ConfigError, match="not filled by patches of 20 x 20") as caught:
            backbones.create(config, size=(64, 80))
        assert "160 x 160 pixels" in (caught.value.fix or "")
        assert backbones.create(config, size=(60, 80)).grids[0] == (3, 4)

    @pytest.mark.parametrize(
        ("name", "stages", "size", "cause"),
        [
            ("test_maxvit", (1, 2), (100, 100), "divisible by window"),
            ("test_vit", (2, 5), (100, 100), "patches of 16 x 16 pixels"),
            ("pit_ti_224", None, (64, 64), "class token"),
            ("resnet18.nope", (1,), (64, 64), "no weights 'nope' of 'resnet18'"),
            ("test_nfnet", (1, 5), (64, 64), r"cut at stages \[1, 5\]"),
        ],
    )
    def test_an_unfit_net_is_an_error_with_its_cause(
        self, name: str, stages: tuple[int, ...] | None, size: tuple[int, int], cause: str
    ) -> None:
        config = BackboneConfig(name=name, stages=stages, weights="none")
        with pytest.raises(ConfigError, match=cause):
            backbones.create(config, size=size)

    def test_other_channels_than_timm_says_are_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make = timm.create_model

        def wrong(*args: Any, **kwargs: Any) -> nn.Module:
            net = make(*args, **kwargs)
            net.output_fmt = "NCHW"
            return net

        monkeypatch.setattr(timm, "create_model", wrong)
        config = BackboneConfig(name="test_mambaout", stages=(1,), weights="none")
        with pytest.raises(ConfigError, match=r"\(1, 16, 8, 32\).*should be .* of \[32\]"):
            backbones.create(config, size=(128, 64))


class TestANetThatTimmDoesNotHave:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"name": "resnet18x"}, "no net 'resnet18x'"),
            ({"stages": (1, 9)}, r"cannot be cut at stages \[1, 9\]"),
            ({"args": {"pad_tpye": "same"}}, "pad_tpye"),
        ],
    )
    def test_is_a_configuration_error(self, changes: dict[str, Any], message: str) -> None:
        chosen = BackboneConfig(name="resnet18", stages=(1,), weights="none")
        with pytest.raises(ConfigError, match=message):
            backbones.create(chosen.model_copy(update=changes))


def test_blocks_after_the_last_stage_are_not_run() -> None:
    made = backbones.create(BackboneConfig(name="mobilenetv2_050", stages=(1,), weights="none"))
    assert not [name for name, _ in made.net.named_parameters() if name.startswith("blocks.2")]


def folded(net: nn.Module) -> dict[str, Tensor]:
    """State of a net whose norms were folded, in float64; conv -> norm pairs by their order."""
    state = dict(net.state_dict())
    conv_name, conv = "", nn.Conv2d(1, 1, 1)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            conv_name, conv = name, module
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            factor = module.weight.double() / (module.running_var.double() + module.eps).sqrt()
            weight = conv.weight.double() * factor[:, None, None, None]
            bias = module.bias.double() - module.running_mean.double() * factor
            state = {k: v for k, v in state.items() if not k.startswith(f"{name}.")}
            state |= {f"{conv_name}.weight": weight.float(), f"{conv_name}.bias": bias.float()}
    return {name: value.detach().contiguous() for name, value in state.items()}


@pytest.mark.data
class TestTheWeightsForDevelopment:
    def test_of_resnet18_fill_layer2_and_layer3(self, shared: Path) -> None:
        file = shared / "data/weights/resnet18_imagenet_stem_to_layer3_bnfolded.safetensors"
        chosen = BackboneConfig(name="resnet18", stages=(2, 3), weights=str(file))
        made = backbones.create(chosen)
        assert made.channels == (128, 256)
        loaded = made.net.state_dict()
        for name, value in load_file(file).items():
            assert torch.equal(loaded[name], value)
        with pytest.raises(WeightsError, match="layer4"):
            backbones.create(chosen.model_copy(update={"stages": (4,)}))

    def test_of_mobilenetv2_fill_it(self, shared: Path) -> None:
        file = shared / "data/weights/mobilenetv2_100_imagenet_from_int8_samepad.safetensors"
        args = {"pad_type": "same", "num_classes": 1001}
        made = backbones.create(
            BackboneConfig(name="mobilenetv2_100", stages=(2, 3), weights=str(file), args=args)
        )
        assert made.channels == (32, 96)


@pytest.mark.parametrize("old", [False, True])
def test_a_file_of_torch_save_is_refused_with_the_way_out(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(WeightsError, match="which may hold code") as caught:
        backbones.read_weights(path)
    assert "save_file" in str(caught.value.fix)
