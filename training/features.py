"""Features of frozen nets: by an engine in the place of the eager net, and kept once computed.

``EngineBackbone`` is what ``training.backbones.create`` gives where ``backbone.engine`` names a
bundle. It answers as the eager net does, without gradients, and its weights stand under the same
names: a run looks the same whichever of the two made it, and is exported without the engine.

``FeatureCache`` remembers what a net said of a picture, in memory and, with a ``FeatureStore``, on
disk across runs and processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engineworks.runtime import files
from engineworks.runtime.bundle import Bundle, read
from engineworks.runtime.engines import BACKENDS, Engine
from engineworks.runtime.errors import ConfigError
from engineworks.runtime.plans import DEFAULT_BATCH, PLANS, origin_of
from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.systems import backbone, choose, open_engines
from engineworks.runtime.tensors import Array
from engineworks.training.config import BackboneConfig

_STREAMING = "tensorrt"  # the backend that works on the caller's stream
_KEPT_SHARE = 7 / 8  # of a store, where room is made: not for every row anew


def read_backbone(config: BackboneConfig, size: tuple[int, int] | None = None) -> Bundle:
    """The bundle that ``config.engine`` names, checked against the rest of the configuration.

    Args:
        size: (height, width) that the net is going to see; None: not known.

    Raises:
        BundleError: no bundle, or a damaged one.
        ConfigError: a bundle of another system, net, stages, arguments or size.
    """
    assert config.engine is not None
    bundle = read(Path(config.engine))
    manifest = bundle.manifest
    again = f"export one: cli.py export backbone:{config.name} --out BUNDLE"
    if manifest.system != backbone.NAME:
        raise ConfigError(
            f"{bundle.root} is a bundle of '{manifest.system}', an engine is one of "
            f"'{backbone.NAME}'",
            fix=again,
        )
    params = bundle.params(backbone.Params)
    assert isinstance(manifest.preprocess, PreprocessSpec)
    facts = {
        "net": (params.name, config.name),
        "stages": (params.stages, config.stages),
        "args": (params.args, config.args),
        "norm": (params.norm, config.norm),
        "size": (manifest.preprocess.size, size or manifest.preprocess.size),
    }
    for what, (there, here) in facts.items():
        if there != here:
            raise ConfigError(
                f"the engine {bundle.root} has {what} {there}, the configuration {here}",
                fix=f"set it to the engine's, or {again}",
            )
    if backbone.WEIGHTS not in manifest.assets:
        raise ConfigError(f"the engine {bundle.root} comes without its weights", fix=again)
    return bundle


class EngineBackbone(nn.Module):
    """A frozen net that an engine runs: images (B, 3, H, W) -> one map (B, C, h, w) per stage.

    Batches may be of any size; a plan gets them in pieces that it takes.

    Attributes:
        identity: names everything that decides what it answers.
        provenance: plain values for a run's record.
        channels, has_token: as of ``training.backbones.LastMap``; of the last map.
    """

    def __init__(
        self,
        eager: nn.Module,
        bundle: Bundle,
        *,
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
    ) -> None:
        """Open the bundle's graph.

        Args:
            eager: the same net; its parts are kept for their weights, and never run.

        Raises:
            BackendError, BundleError, EngineError: see ``runtime.systems.open_engines``.
        """
        super().__init__()
        for name, part in eager.named_children():
            self.add_module(name, part)
        self.requires_grad_(False)
        manifest = bundle.manifest
        backend, precision = choose(bundle, backend, precision)
        self._lent = _Lent(open_engines(bundle, backend, precision, threads=threads))
        self._maps = backbone.map_names(manifest)
        self._largest_batch = _largest_batch(bundle, backend, precision)
        outputs = manifest.graphs[backbone.GRAPH].outputs
        self.channels = int(outputs[self._maps[-1]].shape[1])
        self.has_token = backbone.TOKEN in outputs
        self.identity = f"{manifest.digest} {backend} {precision}"
        self.provenance: dict[str, str] = {
            **manifest.provenance["backbone"],
            "engine": f"{backend}, {precision}",
            "engine_digest": manifest.digest,
        }

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """The maps, on the images' device."""
        answer = self._run(images_BCHW)
        return [answer[name] for name in self._maps]

    def token_and_map(self, images_BCHW: Tensor) -> tuple[Tensor | None, Tensor]:
        """See ``training.backbones.LastMap.token_and_map``."""
        answer = self._run(images_BCHW)
        return answer.get(backbone.TOKEN), answer[self._maps[-1]]

    @torch.no_grad()
    def _run(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        parts = torch.split(images_BCHW.float(), self._largest_batch or max(len(images_BCHW), 1))
        answers = [self._run_part(part.contiguous()) for part in parts]
        if len(answers) == 1:
            return answers[0]
        return {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}

    def _run_part(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Without a copy, unless images and engine are on different sides."""
        engine, device = self._lent.engines[backbone.GRAPH], images_BCHW.device
        if images_BCHW.is_cuda and BACKENDS[engine.backend].needs_gpu:
            stream = None
            if engine.backend == _STREAMING:
                stream = torch.cuda.current_stream(device).cuda_stream
            found = engine.run({"images": images_BCHW}, stream=stream)
            return {name: torch.as_tensor(value, device=device) for name, value in found.items()}
        found = engine.run({"images": images_BCHW.cpu().numpy()})
        return {name: torch.from_numpy(value).to(device) for name, value in found.items()}


class _Lent:
    """Engines that all copies of a module share: they cannot be copied, and keep no state."""

    def __init__(self, engines: dict[str, Engine]) -> None:
        self.engines = engines

    def __deepcopy__(self, _memo: object) -> _Lent:
        return self


def _largest_batch(bundle: Bundle, backend: str, precision: str) -> int | None:
    """The most images that a plan takes at once; None where nothing limits them."""
    if backend != _STREAMING:
        return None
    profiles = origin_of(bundle, backbone.GRAPH, PLANS[precision][0]).config.profiles
    return max(profile.get("batch", DEFAULT_BATCH)[2] for profile in profiles or ({},))


# --- what was computed once ----------------------------------------------------------------------


def content_key(image_CHW: Tensor) -> str:
    """SHA-256 over type, shape and bytes of a network input.

    It holds the picture as well as all that was done to it: preprocessing and augmentation.
    """
    values = image_CHW.detach().cpu().contiguous().numpy()
    digest = hashlib.sha256(f"{values.dtype} {values.shape}\n".encode())
    digest.update(values.data)
    return digest.hexdigest()


class FeatureCache:
    """Features by the content of a picture; the least recently used ones make room.

    It stands in the training process: loader workers share it by not knowing of it.

    Attributes:
        hits, misses: pictures asked for since the cache was made, found and computed.
        num_bytes: of what it holds in memory.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        store: FeatureStore | None = None,
        net: Callable[[], str] = lambda: "",
    ) -> None:
        """An empty cache.

        Args:
            max_bytes: of memory.
            store: what is not in memory is looked for there.
            net: names what computes the features and with which weights, for the store; asked when
                the first picture comes, because a checkpoint may be loaded before.
        """
        self.max_bytes = max_bytes
        self.hits = self.misses = self.num_bytes = 0
        self._store = store
        self._net = net
        self._net_name: str | None = None
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def features(self, encode: Callable[[Tensor], Tensor], pictures_RCHW: Tensor) -> Tensor:
        """(R, ...) features of pictures, each computed when it is first seen.

        One picture at a time: what is kept must not depend on what else was new in its batch, or a
        resumed run, which begins with an empty cache, would become another one.

        Args:
            encode: (1, C, H, W) -> (1, ...); always the same function.
        """
        return torch.stack([self._row(encode, picture) for picture in pictures_RCHW])

    def _row(self, encode: Callable[[Tensor], Tensor], picture_CHW: Tensor) -> Tensor:
        key = content_key(picture_CHW)
        row = self._kept.get(key)
        if row is not None:
            self.hits += 1
            self._kept.move_to_end(key)
            return row
        if self._store is None:
            row = self._compute(encode, picture_CHW)
        else:
            if self._net_name is None:
                self._net_name = self._net()
            name = hashlib.sha256(f"{self._net_name}\n{key}".encode()).hexdigest()
            stored = self._store.get(name)
            if stored is None:
                row = self._compute(encode, picture_CHW)
                self._store.put(name, row.cpu().numpy())
            else:
                self.hits += 1
                row = torch.from_numpy(np.array(stored)).to(picture_CHW.device)
        self._keep(key, row)
        return row

    def _compute(self, encode: Callable[[Tensor], Tensor], picture_CHW: Tensor) -> Tensor:
        self.misses += 1
        return encode(picture_CHW[None])[0].detach()

    def _keep(self, key: str, row: Tensor) -> None:
        self._kept[key] = row
        self.num_bytes += row.nbytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._kept.popitem(last=False)[1].nbytes


class FeatureStore:
    """Arrays in a folder, one file each, by name; the least recently used ones make room.

    Any number of processes may share it. A file appears whole or not at all.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        """Open a folder, which is made if need be.

        Args:
            max_bytes: of all files together, never exceeded.
        """
        self.root = root
        self.max_bytes = max_bytes
        root.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Array | None:
        """The array, memory-mapped and read-only; None where it is not there.

        A file that a failing machine cut short counts as none.
        """
        path = self._path(name)
        try:
            found: Array = np.load(path, mmap_mode="r")
            os.utime(path)  # the time of its last use decides what makes room
        except (FileNotFoundError, ValueError, EOFError):
            return None
        return found

    def put(self, name: str, values: Array) -> None:
        """Keep an array, in the place of what has the name; not one larger than the store."""
        path = self._path(name)
        path.parent.mkdir(exist_ok=True)
        with files.naming(path), files.NewFile(self.root) as new:
            np.save(new.file, values)
            size = new.file.tell()
            if size <= self.max_bytes:
                with self._total() as total:
                    if path.exists():
                        total[0] -= path.stat().st_size
                        path.unlink()  # or it would be counted again where room is made
                    if total[0] + size > self.max_bytes:
                        total[0] = self._make_room(size)
                    new.place(path, replace=False, durable=False)
                    total[0] += size

    def _path(self, name: str) -> Path:
        return self.root / name[:2] / f"{name}.npy"

    @contextmanager
    def _total(self) -> Iterator[list[int]]:
        """The bytes of all files, to be read and changed by one process at a time."""
        with (self.root / "size").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            total = [int(text) if text else sum(size for _, size, _ in self._files())]
            yield total
            file.truncate(0)
            file.write(str(total[0]))

    def _make_room(self, size: int) -> int:
        """Delete the least recently used files; the bytes of those left."""
        files = sorted(self._files())
        total = sum(each for _, each, _ in files)
        room = min(int(_KEPT_SHARE * self.max_bytes), self.max_bytes - size)
        for _, each, path in files:
            if total <= room:
                break
            path.unlink()
            total -= each
        return total

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of last use in ns, bytes, path) of every file."""
        return [
            (stat.st_mtime_ns, stat.st_size, path)
            for path in self.root.glob("??/*.npy")
            for stat in (path.stat(),)
        ]
