"""Folders that outgrow a machine: bundles at work in actors of Ray Data, answers as rows of Arrow.

A dataset of Ray is mapped, wherever its pictures lie::

    import ray
    from engineworks.batch import Mapper

    pictures = ray.data.read_binary_files("s3://parts/today", include_paths=True)
    rows = pictures.map_batches(
        Mapper,
        fn_constructor_args=("bundle",),
        compute=ray.data.ActorPoolStrategy(size=8),
        batch_size=64,
        num_cpus=1,
    )
    rows.write_parquet("answers")

``cli.py batch`` does it for files that every machine sees, and can be taken up again. Needs the
extra ``ray``; of what is here, only ``cluster`` and ``job`` import Ray.
"""

from __future__ import annotations

if __name__ == "batch":  # by the folder's own name, from the root of a checkout
    from engineworks.folders import same

    same(__name__)

try:
    from engineworks.batch.mapper import Mapper
    from engineworks.batch.rows import schema_of
except ModuleNotFoundError as error:
    if error.name != "pyarrow":
        raise
    raise ImportError(
        "engineworks.batch needs 'pyarrow', which is not installed\n"
        '  fix: pip install "engineworks[ray]"'
    ) from error

__all__ = ["Mapper", "schema_of"]
