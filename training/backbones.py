"""Backbones: any timm net by name, cut at chosen stages or whole, with weights from a stated place.

There is no silent fallback between the places: the hub, a local file and random numbers are each
asked for by name, and what was loaded is recorded with its hash.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import PatchEmbed
from timm.layers.format import Format
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from engineworks.runtime.bundle import sha256_file
from engineworks.runtime.errors import ConfigError, WeightsError
from engineworks.runtime.systems.backbone import GRAPH, WEIGHTS, map_names
from engineworks.training.config import BackboneConfig
from engineworks.training.features import EngineBackbone, FeatureCache, FeatureStore, read_backbone

# where timm keeps the rest of a net inside its own feature wrappers
_WRAPPERS = ("", "model.", "body.")
_PICKLES = (b"PK\x03\x04", b"\x80")  # how files of torch.save begin, now and before 1.6


@dataclass(frozen=True)
class Backbone:
    """A feature extractor and where its weights came from.

    Attributes:
        net: images (B, 3, H, W) -> one map (B, C, h, w) per stage.
        channels: C of each map, as timm has it; the net was run once, and its maps agree.
        grids: (h, w) of each map.
        provenance: plain values for the run's record.
    """

    net: nn.Module
    channels: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]
    provenance: dict[str, str]


def create(
    config: BackboneConfig,
    *,
    seed: int = 0,
    weights: bool = True,
    size: tuple[int, int] | None = None,
) -> Backbone:
    """Build a backbone; where ``config.engine`` names a bundle, one that an engine runs.

    Args:
        seed: of the random weights where ``config.weights`` is ``none``.
        weights: False builds the net alone, to load a checkpoint into it.
        size: (height, width) of the images, for a net that is made for one size; None: the one
            that it comes with.

    Raises:
        ConfigError: timm has no such net, stage or argument, or the engine is of another one.
        WeightsError: the weights cannot be had, are corrupt or do not fit; names what is missing.
        BundleError, BackendError, EngineError: the engine cannot be opened.
    """
    if config.engine is not None:
        return _by_engine(config, weights=weights, size=size)
    pretrained = weights and config.weights == "hub"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, channels = _cut(_create(config, pretrained, size), config)
    pretrained_cfg: Mapping[str, Any] = model_of(net).pretrained_cfg
    if config.channels_last:
        net.to(memory_format=torch.channels_last)
    provenance = {"backbone": config.name, "weights": config.weights}
    if pretrained:
        provenance["weights"] = f"hub: {pretrained_cfg.get('hf_hub_id') or pretrained_cfg['url']}"
    elif weights and config.weights == "none":
        provenance["weights"] = f"random, seed {seed}"
    elif weights:
        path = Path(config.weights)
        load_weights(net, read_weights(path), source=str(path))
        provenance |= {"weights": path.name, "sha256": sha256_file(path)}
    if weights:
        provenance["tensors_sha256"] = tensors_sha256(net.state_dict())
    with _explained(config, size):
        if size is not None and hasattr(model_of(net), "set_input_size"):
            model_of(net).set_input_size(img_size=size)
        grids = _grids(config, net, channels, size or native_size(net))
    if config.compile:
        net.compile()
    return Backbone(net=net, channels=channels, grids=grids, provenance=provenance)


def model_of(net: nn.Module) -> Any:
    """What timm made, without what is around it here."""
    return net.model if isinstance(net, LastMap | ChannelsFirst) else getattr(net, "model", net)


def is_transformer(net: nn.Module) -> bool:
    """Whether a net normalises its layers: its residual stream then has channels of any size."""
    return any(isinstance(part, nn.LayerNorm) for part in net.modules())


def native_size(net: nn.Module) -> tuple[int, int]:
    """(height, width) of the pictures that a net of ``create`` was made for."""
    model = model_of(net)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = size or model.pretrained_cfg["input_size"][1:]
    return height, width


def _by_engine(config: BackboneConfig, *, weights: bool, size: tuple[int, int] | None) -> Backbone:
    bundle = read_backbone(config, size)
    eager = create(config.plain(), weights=False, size=bundle.manifest.preprocess.size)
    if weights:
        eager.net.load_state_dict(read_weights(bundle.asset(WEIGHTS)))
    outputs = bundle.manifest.graphs[GRAPH].outputs
    maps = [outputs[name].shape[1:] for name in map_names(bundle.manifest)]
    if maps != [(c, *grid) for c, grid in zip(eager.channels, eager.grids, strict=True)]:
        raise ConfigError(
            f"the engine {bundle.root} gives maps (C, h, w) of {maps}, '{config.name}' gives "
            f"{eager.channels} channels on grids {eager.grids}",
            fix=f"export it again: cli.py export backbone:{config.name} --out BUNDLE",
        )
    net = EngineBackbone(
        eager.net, bundle, backend=config.engine_backend, precision=config.engine_precision
    )
    return Backbone(net=net, channels=eager.channels, grids=eager.grids, provenance=net.provenance)


def feature_cache(config: BackboneConfig, net: nn.Module, *, max_bytes: int) -> FeatureCache:
    """A cache for what a frozen net says, on disk as well where the configuration names a folder.

    Args:
        net: computes the features; made by ``create``, or holds what was.
        max_bytes: of memory.
    """
    if config.store is None:
        return FeatureCache(max_bytes)

    def name() -> str:
        engines = [part.identity for part in net.modules() if isinstance(part, EngineBackbone)]
        return f"{net}\n{tensors_sha256(net.state_dict())}\n{engines}"

    store = FeatureStore(Path(config.store), config.store_bytes)
    return FeatureCache(max_bytes, store=store, net=name)


# what timm raises where a net, its arguments and its pictures do not go together
_UNFIT = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _create(config: BackboneConfig, pretrained: bool, size: tuple[int, int] | None) -> Any:
    """A net as timm makes it, for pictures of that size."""
    _check_name(config.name)
    net = _made(config, pretrained, {})
    native, model = net.pretrained_cfg["input_size"][1:], getattr(net, "model", net)
    has_one_size = net.pretrained_cfg.get("fixed_input_size", False)
    if has_one_size and not hasattr(model, "set_input_size") and size not in (None, native):
        # a net that timm takes apart has to know it from the start
        net = _made(config, pretrained, {"img_size": size})
    if config.checkpointing:
        try:
            net.set_grad_checkpointing()
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise ConfigError(
                f"'{config.name}' has no gradient checkpointing", fix="set it to false"
            ) from error
    return net


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ConfigError(
            f"timm has no net '{name}'",
            fix=f"choose one of {', '.join(near)}, ..."
            if near
            else "see timm.list_models() for the names",
        )
    try:
        get_pretrained_cfg(name)
    except RuntimeError as error:
        arch, _, tag = name.partition(".")
        known = [full for full in get_arch_pretrained_cfgs(arch) if full != arch]
        raise ConfigError(
            f"timm has no weights '{tag}' of '{arch}'",
            fix=f"write {arch}, or one of {', '.join(known[:5])}" if known else f"write {arch}",
        ) from error


def _made(config: BackboneConfig, pretrained: bool, sized: Mapping[str, Any]) -> Any:
    whole = config.stages is None
    cut: dict[str, Any] = {"features_only": True, "out_indices": config.stages}
    if whole:
        cut = {"num_classes": 0}
    if config.norm:
        cut["feature_cls"] = _Normed
    arguments = {**cut, **sized, **config.args}
    try:
        return timm.create_model(config.name, pretrained=pretrained, **arguments)
    except _UNFIT as error:
        if pretrained and isinstance(error, RuntimeError):
            _made(config, False, sized)  # if this can be made, it is the weights
            raise _no_weights(config, error) from error
        given = f"arguments {dict(config.args)}"
        if sized:
            given = f"pictures of {_pixels(sized['img_size'])} and {given}"
        raise ConfigError(
            f"'{config.name}' cannot be made with {given}: {_cause(error)}"
            if whole
            else f"'{config.name}' cannot be cut at stages {list(config.stages or ())} with "
            f"{given}: {_cause(error)}",
            fix="stages count from 0 at the stem; layer2 and layer3 of a ResNet are [2, 3]",
        ) from error
    except OSError as error:
        if not pretrained:
            raise
        raise _no_weights(config, error) from error


def _no_weights(config: BackboneConfig, error: Exception) -> WeightsError:
    return WeightsError(
        f"the pretrained weights of '{config.name}' cannot be fetched: {_cause(error)}",
        fix="connect to the hub once, or give a local file with "
        "--set backbone.weights=FILE.safetensors",
    )


def _cause(error: Exception) -> str:
    """The first line of what a library says, or the kind of its error where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"


@contextmanager
def _explained(config: BackboneConfig, size: tuple[int, int] | None) -> Iterator[None]:
    """Turn what a net says of pictures that it cannot take into an error of the configuration."""
    try:
        yield
    except _UNFIT as error:
        own = _pixels(get_pretrained_cfg(config.name).input_size[1:])
        raise ConfigError(
            f"'{config.name}' cannot take pictures of {_pixels(size) if size else own}: "
            f"{_cause(error)}",
            fix=f"it was made for {own}: give pictures of that size, of a multiple of its patches "
            "and windows, or choose another net",
        ) from error


def _cut(net: Any, config: BackboneConfig) -> tuple[Any, tuple[int, ...]]:
    """A net that gives maps (B, C, h, w) alone, and the C of each."""
    if config.stages is None:
        with _explained(config, None):
            last = LastMap(net, frozen_norms=config.frozen_norms)
        return last, (last.channels,)
    _trim(net)
    channels = tuple(net.feature_info.channels())
    if config.norm and not (_has_norm(net.model) and len(set(channels)) == 1):
        raise ConfigError(
            f"'{config.name}' has no last norm for all of its stages {list(config.stages)}",
            fix="set backbone.norm to false: it is for the blocks of a plain transformer",
        )
    return (ChannelsFirst(net) if _is_channels_last(net) else net), channels


def _is_channels_last(net: Any) -> bool:
    return bool(getattr(net, "output_fmt", Format.NCHW) == Format.NHWC)


def _grids(
    config: BackboneConfig, net: nn.Module, channels: tuple[int, ...], size: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
    """(h, w) of each map, found by running the net once: its maps are what timm says of them.

    Raises:
        ConfigError: other maps.
        ValueError: patches that would leave a strip of the pictures unseen.
    """
    patches = getattr(model_of(net), "patch_embed", None)
    if isinstance(patches, PatchEmbed) and not patches.dynamic_img_pad:
        h, w = patches.patch_size
        if size[0] % h or size[1] % w:
            raise ValueError(f"they are not filled by patches of {_pixels((h, w))}")
    was_training = net.training
    like = next(net.parameters())
    with torch.no_grad():
        maps = net.eval()(torch.zeros(1, 3, *size, dtype=like.dtype, device=like.device))
    net.train(was_training)
    found = [tuple(m.shape) for m in maps]
    if any(len(shape) != 4 for shape in found) or [shape[1] for shape in found] != list(channels):
        raise ConfigError(
            f"'{config.name}' gives maps of shapes {found} for pictures of {_pixels(size)}; they "
            f"should be (1, C, h, w) with C of {list(channels)}",
            fix="choose another net, or other stages of this one",
        )
    return tuple((shape[2], shape[3]) for shape in found)


class _Normed(FeatureGetterNet):  # type: ignore[misc]  # timm's types are not read
    """Blocks of a timm net behind its last norm."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, norm=True, **settings)


def _has_norm(model: Any) -> bool:
    norm = getattr(model, "norm", None)
    return isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity)


class ChannelsFirst(nn.Module):
    """A timm feature net that keeps the channels last: images (B, 3, H, W) -> maps (B, C, h, w)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        return [map_BHWC.permute(0, 3, 1, 2) for map_BHWC in self.model(images_BCHW)]


class LastMap(nn.Module):
    """The last feature map of a whole timm net: images (B, 3, H, W) -> [(B, C, h, w)].

    What only the net's classifier would use is removed.

    Args:
        frozen_norms: batch norms stay in eval mode, whatever mode the net is in.

    Attributes:
        channels: C.
        has_token: whether the net has a class token.
    """

    def __init__(self, model: Any, *, frozen_norms: bool = False) -> None:
        super().__init__()
        self.model = model
        self.frozen_norms = frozen_norms
        self.channels = int(model.num_features)
        self.has_token = getattr(model, "cls_token", None) is not None
        self._num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
        if self.has_token and not self._num_prefix_tokens:
            raise ValueError("it does not tell its class token from the patches")
        self._is_channels_last = _is_channels_last(model)
        self._remove_unused()

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        return [self.token_and_map(images_BCHW)[1]]

    def token_and_map(self, images_BCHW: Tensor) -> tuple[Tensor | None, Tensor]:
        """The class token (B, C) of a net that has one, and the map (B, C, h, w)."""
        features = self.model.forward_features(images_BCHW)
        if features.ndim == 3:  # tokens: the first ones stand for the whole image
            tokens_BNC = features[:, self._num_prefix_tokens :]
            h, w = self._grid(images_BCHW, tokens_BNC.shape[1])
            token_BC = features[:, 0] if self.has_token else None
            return token_BC, tokens_BNC.transpose(1, 2).unflatten(2, (h, w))
        return None, features.permute(0, 3, 1, 2) if self._is_channels_last else features

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen_norms:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    @staticmethod
    def _grid(images_BCHW: Tensor, num_tokens: int) -> tuple[int, int]:
        """(h, w) of square patches that cover the image."""
        height, width = images_BCHW.shape[2:]
        patch = math.isqrt(height * width // num_tokens)
        h, w = height // patch, width // patch
        if h * w != num_tokens:
            raise ValueError(f"its {num_tokens} tokens are no grid of square patches")
        return h, w

    def _remove_unused(self) -> None:
        """Empty the modules whose parameters the last map does not depend on."""
        was_training = self.model.training
        with torch.enable_grad():
            (last,) = self.eval()(torch.zeros(1, 3, *native_size(self)))
            last.sum().backward()
        self.train(was_training)
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                parameters = list(child.parameters())
                if parameters and all(p.grad is None for p in parameters):
                    setattr(module, name, nn.Identity())
        self.zero_grad()


def _trim(net: Any) -> None:
    """Cut off what comes after the last chosen stage, where timm runs it for nothing."""
    *container, last = net.feature_info.module_name()[-1].split(".")
    blocks = getattr(net, ".".join(container), None)
    if isinstance(blocks, nn.Sequential) and last.isdecimal():
        del blocks[int(last) + 1 :]


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        WeightsError: no such file, or not a whole safetensors file.
    """
    if not path.is_file():
        raise WeightsError(
            f"there is no weights file {path}",
            fix="check --set backbone.weights=FILE, or use `hub` or `none`",
        )
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        with path.open("rb") as file:
            if file.read(4).startswith(_PICKLES):
                raise WeightsError(
                    f"{path} is a file of torch.save, which may hold code and is never loaded",
                    fix="convert it where you trust it: safetensors.torch.save_file("
                    "torch.load(PATH, weights_only=True), 'weights.safetensors'); a checkpoint "
                    "keeps the weights in one of its entries, such as 'state_dict' or 'model'",
                ) from error
        raise WeightsError(
            f"{path} is not a whole safetensors file ({error})",
            fix="copy or download it again"
            if path.suffix == ".safetensors"
            else "give weights as FILE.safetensors, under timm's names",
        ) from error


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Fill a timm feature net from the tensors of the whole net, by timm's names.

    A file whose BatchNorms are folded into the convolutions (biases on the convolutions, the
    norms absent) is taken as well: the bias moves into a norm that is otherwise the identity.
    What the net does not have, such as the classifier, is left out.

    Args:
        source: the file's name, for messages.

    Raises:
        WeightsError: something that the net needs is missing or of another shape.
    """
    tensors = _unfolded(net, tensors)
    chosen, missing, misfits = {}, [], []
    for name, value in net.state_dict().items():
        found = _find(tensors, name)
        if found is not None and found.shape != value.shape:
            misfits.append(f"{name} {tuple(found.shape)} instead of {tuple(value.shape)}")
        elif found is not None:
            chosen[name] = found
        elif not name.endswith("num_batches_tracked"):  # a counter that only training reads
            missing.append(name)
    if missing or misfits:
        what = [*misfits, *(f"{name} is missing" for name in missing)]
        more = f" and {len(what) - 4} more" if len(what) > 4 else ""
        raise WeightsError(
            f"{source} does not fit the chosen stages: {'; '.join(what[:4])}{more}",
            fix="give the weights of this net under timm's names, or choose other stages",
        )
    net.load_state_dict(chosen, strict=False)


def _find(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """A tensor of the whole net by its name in timm's feature wrapper.

    Source: timm, ``FeatureDictNet``: `features.1` becomes `features_1` when a Sequential is
    flattened into the wrapper.
    """
    for wrapper in _WRAPPERS:
        if name.startswith(wrapper):
            inner = name.removeprefix(wrapper)
            if inner in tensors:
                return tensors[inner]
            head, dot, tail = inner.partition(".")
            nested = ".".join(head.rsplit("_", 1)) + dot + tail
            if nested in tensors:
                return tensors[nested]
    return None


def _unfolded(net: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give back the norms that were folded away: y = conv(x) + bias = norm(conv(x))."""
    unfolded = dict(tensors)
    bias: Tensor | None = None  # of the convolution just before, where the net has none
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            bias = None if module.bias is not None else _find(tensors, f"{name}.bias")
        elif isinstance(module, nn.BatchNorm2d):
            if bias is not None:
                one = torch.ones_like(bias)
                unfolded |= {
                    f"{name}.weight": one,
                    f"{name}.bias": bias,
                    f"{name}.running_mean": torch.zeros_like(bias),
                    f"{name}.running_var": one - module.eps,
                }
            bias = None
    return unfolded


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
