"""Peak memory of calibration with few and with many images.

python -m tests.benchmarks.calibration_memory BUNDLE --samples DIR [--num 64 --num 512]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import onnx

from engineworks.calibration import calibrate
from engineworks.calibration.samples import choose
from engineworks.export.quantize import activations
from engineworks.runtime.bench import peak_rss_bytes
from engineworks.runtime.bundle import read


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--samples", type=click.Path(path_type=Path), required=True)
@click.option("--num", "nums", multiple=True, type=int, default=(64, 512))
@click.option("--inside", is_flag=True, hidden=True)
def main(bundle: Path, samples: Path, nums: tuple[int, ...], inside: bool) -> None:
    """Print the peak of a fresh process for each number of images."""
    if not inside:
        for num in nums:
            command = [sys.executable, "-m", __spec__.name, str(bundle), "--samples", str(samples)]
            subprocess.run([*command, "--num", str(num), "--inside"], check=True)
        return
    opened = read(bundle)
    tensors = {
        name: activations(onnx.load(opened.path(graph.variants["float"])))
        for name, graph in opened.manifest.graphs.items()
    }
    calibrate.measure(opened, choose(samples, nums[0], 0), tensors)
    click.echo(f"{nums[0]} images: peak {peak_rss_bytes() / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
