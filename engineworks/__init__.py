"""Train small-data vision systems, export them as bundles, run those without PyTorch.

Run a bundle. Its class gives results their type; without one, ``open_bundle`` takes any bundle::

    from engineworks import NoisingSystem, open_bundle, read_image

    with open_bundle("bundle", NoisingSystem) as system:
        for result in system.infer([read_image("part.png")]):
            print(result.is_anomalous, result.score)

===================  =============================  ==================
class                reads images with              answers with
===================  =============================  ==================
``NoisingSystem``    ``read_image``                 ``AnomalyMap``
``PacoSystem``       ``read_image``                 ``Classification``
``RefdetSystem``     ``read_image``                 ``Detections``
``StripeSystem``     ``read_planes``                ``DefectMap``
``BackboneSystem``   ``read_image``                 ``Embedding``
===================  =============================  ==================

Train, and export (needs the extra ``train``)::

    from pathlib import Path
    from engineworks import ExportConfig, export_bundle, load_config, train

    data = Path("data")
    run = train(load_config("noising", overrides=["fit.max_rows=1000"]), data, Path("run"))
    config = ExportConfig(int8=True, samples=data / "train", evaluation=data)
    export_bundle(run.root, Path("bundle"), config)

Images are NumPy arrays, (H, W, 3): uint8 RGB of ``read_image``, the sensor's own values of
``read_planes``. Errors are those of the module ``errors``, all below ``EngineworksError``; each
says in ``fix`` what to do about it. The module ``testing`` makes small bundles and data for tests.

What ``__all__`` names is promised, see ``docs/stability.md``; whatever else can be imported may
change with any version. Each name is loaded when it is first asked for: the import itself loads
neither NumPy, OpenCV, ONNX nor PyTorch. The function that exports is called ``export_bundle``,
because ``engineworks.export`` is the package behind it.
"""

from __future__ import annotations

import os as _os
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# ONNX Runtime's official builds tell Microsoft about models and machines, and keep a number of this
# one in the user's cache; it looks here before it begins (the second is the name it had at first)
for _name in ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED"):
    _os.environ.setdefault(_name, "1")

if TYPE_CHECKING:
    from engineworks.export.config import ExportConfig
    from engineworks.export.pipeline import export as export_bundle
    from engineworks.runtime import errors, testing
    from engineworks.runtime.errors import EngineworksError
    from engineworks.runtime.evaluation import Evaluation
    from engineworks.runtime.images import read as read_image
    from engineworks.runtime.planes import read as read_planes
    from engineworks.runtime.references import Prototypes, read_references
    from engineworks.runtime.results import (
        AnomalyMap,
        Candidate,
        Classification,
        DefectMap,
        Detection,
        Detections,
        Embedding,
    )
    from engineworks.runtime.systems import System, open_bundle
    from engineworks.runtime.systems.backbone import System as BackboneSystem
    from engineworks.runtime.systems.noising import System as NoisingSystem
    from engineworks.runtime.systems.paco import System as PacoSystem
    from engineworks.runtime.systems.refdet import System as RefdetSystem
    from engineworks.runtime.systems.stripe import System as StripeSystem
    from engineworks.training.config import load_config
    from engineworks.training.run import Run
    from engineworks.training.train import train
else:
    # name -> module below engineworks, and the name there where it is another
    _HOMES = {
        "AnomalyMap": "runtime.results",
        "BackboneSystem": "runtime.systems.backbone:System",
        "Candidate": "runtime.results",
        "Classification": "runtime.results",
        "DefectMap": "runtime.results",
        "Detection": "runtime.results",
        "Detections": "runtime.results",
        "Embedding": "runtime.results",
        "EngineworksError": "runtime.errors",
        "Evaluation": "runtime.evaluation",
        "ExportConfig": "export.config",
        "NoisingSystem": "runtime.systems.noising:System",
        "PacoSystem": "runtime.systems.paco:System",
        "Prototypes": "runtime.references",
        "RefdetSystem": "runtime.systems.refdet:System",
        "Run": "training.run",
        "StripeSystem": "runtime.systems.stripe:System",
        "System": "runtime.systems",
        "errors": "runtime",
        "export_bundle": "export.pipeline:export",
        "load_config": "training.config",
        "open_bundle": "runtime.systems",
        "read_image": "runtime.images:read",
        "read_planes": "runtime.planes:read",
        "read_references": "runtime.references",
        "testing": "runtime",
        "train": "training.train",
    }

    def __getattr__(name: str) -> object:
        """A public name, from where it lives; see PEP 562."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        home, _, there = _HOMES[name].partition(":")
        try:
            if name in ("errors", "testing"):
                return import_module(f"{__name__}.{home}.{name}")
            return getattr(import_module(f"{__name__}.{home}"), there or name)
        except ModuleNotFoundError as error:
            extra = "train" if home.startswith("training") else "cpu"
            raise ImportError(
                f"{__name__}.{name} needs '{error.name}', which is not installed\n"
                f'  fix: pip install "{__name__}[{extra}]"'
            ) from error

    def __dir__() -> list[str]:
        return [*__all__, "__version__"]


__all__ = [
    "AnomalyMap",
    "BackboneSystem",
    "Candidate",
    "Classification",
    "DefectMap",
    "Detection",
    "Detections",
    "Embedding",
    "EngineworksError",
    "Evaluation",
    "ExportConfig",
    "NoisingSystem",
    "PacoSystem",
    "Prototypes",
    "RefdetSystem",
    "Run",
    "StripeSystem",
    "System",
    "errors",
    "export_bundle",
    "load_config",
    "open_bundle",
    "read_image",
    "read_planes",
    "read_references",
    "testing",
    "train",
]
