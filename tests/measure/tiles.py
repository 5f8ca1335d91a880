"""Measure tiles: the error at their seams, and the memory of a very large image. Each line that is printed is JSON.

python tests/measure/tiles.py seams --checkpoint dinov2_vits14 --backbone-weights FILE --photos DIR --res 672
python tests/measure/tiles.py memory --checkpoint dinov2_vits14 --backbone-weights FILE --photos DIR --side 20000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from PIL import Image

from brixel_cli.core.sampling import Part
from brixel_cli.data.images import load_image
from brixel_cli.data.resizing import Resizing
from brixel_cli.engines.extracting.tiled_images import tile_reader
from brixel_cli.engines.extracting.tiling import Tiling, strips
from brixel_cli.engines.models import FeatureExtractor, model_spec
from brixel_cli.engines.reporting import Silent
from brixel_cli.engines.runtime import Runtime


def overlapped(tiling: Tiling, size: tuple[int, int]) -> torch.Tensor:
    """Which locations of a map more than one tile covers."""
    counts = []
    for side in size:
        count = torch.zeros(side // tiling.patch_size * tiling.finer)
        for start in tiling.starts(side):
            first = start // tiling.patch_size * tiling.finer
            count[first : first + min(side, tiling.tile) // tiling.patch_size * tiling.finer] += 1
        counts.append(count)
    return torch.outer(*counts) > 1


def seams(options: argparse.Namespace) -> None:
    """Cosine of the tiled map to the untiled one: inside the overlaps, and elsewhere; means over images."""
    spec = model_spec(options.source, checkpoint=options.checkpoint, weights=options.backbone_weights)
    model = FeatureExtractor(spec, Runtime("cpu", options.precision), Silent())
    patch, finer = spec.patch_size, spec.factor if spec.source == "student" else 1
    resizing = Resizing(options.res, "short", patch)
    files = sorted(path for path in options.photos.rglob("*") if path.suffix in (".jpg", ".png"))[: options.most]
    found: dict[tuple[int, float], list[tuple[float, float, float]]] = {}
    for file in files:
        image = load_image(file)
        size = resizing.model_size(image.height, image.width)
        read = tile_reader(image, Part(0, 0, image.height, image.width), size)
        whole = model.maps(read(0, 0, size)[None])[0]
        for overlap in options.overlaps:
            for trim in options.trims:
                tiling = Tiling(options.tile // patch * patch, round(overlap / patch) * patch, patch, finer, trim)
                tiled = torch.cat([strip for _, strip in strips(model.maps, read, size, tiling)], dim=1)
                cosine = torch.cosine_similarity(tiled, whole, dim=0)
                inside = overlapped(tiling, size)
                figures = (
                    float(cosine[inside].mean()),
                    float(cosine[~inside].mean()),
                    float(cosine[inside].quantile(0.05)),
                )
                found.setdefault((tiling.overlap, trim), []).append(figures)
        sys.stderr.write(json.dumps({"image": file.name, "input": size}) + "\n")
    for (overlap, trim), figures in found.items():
        values = torch.tensor(figures)
        means = values.mean(dim=0).tolist()
        line = {
            "overlap": overlap,
            "trim": trim,
            "inside": round(means[0], 4),
            "worst_image": round(float(values[:, 0].min()), 4),
            "lowest_5_percent": round(means[2], 4),
            "outside": round(means[1], 4),
            "images": len(figures),
        }
        sys.stdout.write(json.dumps(line) + "\n")


def memory(options: argparse.Namespace) -> None:
    """Peak memory of `brixel extract --tile` of one image, sampled; --seconds stops it, since memory is flat by strips."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        large = Path(scratch) / "large.jpg"
        tile = load_image(next(path for path in sorted(options.photos.rglob("*")) if path.suffix in (".jpg", ".png")))
        whole = Image.new("RGB", (options.side, options.side))
        for top in range(0, options.side, tile.height):
            for left in range(0, options.side, tile.width):
                whole.paste(tile, (left, top))
        whole.save(large, quality=85)
        del whole
        command = [
            sys.executable,
            "-m",
            "brixel_cli",
            "extract",
            "--input",
            str(large),
            "--res",
            str(options.res or options.side),
        ]
        command += ["--tile", str(options.tile), "--source", options.source, "--output", f"{scratch}/out.h5", "--json"]
        command += ["--precision", options.precision, "--device", "cpu", "--quiet", "--workers", "1"]
        command += ["--checkpoint", options.checkpoint] if options.checkpoint else []
        command += ["--backbone", options.backbone] if options.backbone else []
        command += ["--backbone-weights", options.backbone_weights] if options.backbone_weights else []
        began, peak, anonymous, ended = time.perf_counter(), 0, 0, False
        process = subprocess.Popen(command)
        watched = psutil.Process(process.pid)
        while time.perf_counter() - began < options.seconds:
            if process.poll() is not None:
                ended = True
                break
            try:
                now = watched.memory_info()
            except psutil.NoSuchProcess:
                continue
            peak, anonymous = max(peak, now.rss), max(anonymous, now.rss - now.shared)
            time.sleep(0.05)
        process.kill()
        process.wait()
        line = {
            "side": options.side,
            "ended": ended and process.returncode == 0,
            "seconds": round(time.perf_counter() - began),
            "peak_mib": round(peak / 2**20),
            "peak_without_files_mib": round(anonymous / 2**20),
        }
        sys.stdout.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bar", choices=["seams", "memory"])
    parser.add_argument("--checkpoint")
    parser.add_argument("--backbone")
    parser.add_argument("--backbone-weights")
    parser.add_argument("--source", default="student")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--res", type=int)
    parser.add_argument("--tile", type=int, default=448)
    parser.add_argument("--most", type=int, default=6)
    parser.add_argument("--overlaps", type=int, nargs="+", default=[28, 64, 112, 168, 224])
    parser.add_argument("--trims", type=float, nargs="+", default=[0.0, 0.25])
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--scratch", default=None)
    options = parser.parse_args()
    {"seams": seams, "memory": memory}[options.bar](options)


if __name__ == "__main__":
    main()
