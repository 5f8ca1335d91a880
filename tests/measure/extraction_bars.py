"""Measure what `brixel extract` promises: python tests/measure/extraction_bars.py BAR --checkpoint RUN --photos DIR ...

Bars: throughput, memory, int8, writing, processes. Each prints one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def command(options: argparse.Namespace, folder: Path, output: Path, *more: str) -> list[str]:
    arguments = ["extract", "--input", str(folder), "--res", str(options.res), "--output", str(output), *more]
    arguments += ["--source", options.source, "--quiet"]
    for name in ("checkpoint", "backbone", "backbone_weights", "precision", "batch_size"):
        value = getattr(options, name)
        arguments += [f"--{name.replace('_', '-')}", str(value)] if value else []
    return arguments


def run(options: argparse.Namespace, folder: Path, output: Path, *more: str) -> dict:
    """Run the command to its end; its JSON, its seconds and its peak memory."""
    output.unlink(missing_ok=True)
    before = time.perf_counter()
    arguments = [sys.executable, "-m", "brixel_cli", *command(options, folder, output, "--json", *more)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(arguments, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed, complaints = (file.seek(0) or file.read() for file in (out, err))
    if "Traceback" in complaints:
        raise SystemExit(complaints)
    result = json.loads(printed) if printed else {"error": complaints}
    return result | {
        "wall": time.perf_counter() - before,
        "code": process.returncode,
        "stderr": complaints,
        "peak_mib": round(usage.ru_maxrss / 1024, 1),
    }


def many(photos: Path, folder: Path, count: int) -> Path:
    """A folder of `count` photographs, repeated where there are fewer."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    for number, path in zip(range(count), itertools.cycle(files), strict=False):
        os.symlink(path.resolve(), folder / f"{number:05}{path.suffix}")
    return folder


def rows_of(output: Path) -> dict[str, bytes]:
    from brixel_cli import FeatureFile

    features = FeatureFile(output)
    return {features.paths[row]: features.stored(row)["features"].tobytes() for row in features.rows}


def throughput(options: argparse.Namespace, scratch: Path) -> dict:
    """The command's images per second, from the first image to the last, over a bare loop's with the same batches."""
    import torch

    from brixel_cli.data.feature_file import FeatureFile
    from brixel_cli.engines.models import model_spec
    from brixel_cli.engines.runtime import Runtime

    folder = many(options.photos, scratch / "photos", options.count)
    result = run(options, folder, scratch / "f.h5")
    features = FeatureFile(scratch / "f.h5")
    sizes = {tuple(int(side) for side in size) for size in features.model_size}
    runtime = Runtime(precision=options.precision or "auto")
    spec = model_spec(
        options.source, checkpoint=options.checkpoint, backbone=options.backbone, weights=options.backbone_weights
    )
    model = spec.load(str(runtime.device))
    seconds = 0.0
    for size in sorted(sizes):
        rows = int((features.model_size == size).all(axis=1).sum())
        batch = features.description["batch_sizes"][f"{size[0]}x{size[1]}"]
        images = torch.randn(batch, 3, *size, device=runtime.device)
        loops = [min(batch, rows - at) for at in range(0, rows, batch)]
        with torch.inference_mode(), runtime.autocast():
            model(images)  # not timed: the first pass compiles and allocates
            began = time.perf_counter()
            for count in loops:
                model(images[:count]).float().sum().item()
            seconds += time.perf_counter() - began
    bare, ours = len(features) / seconds, result["computed"] / result["seconds"]
    return {"images_per_second": ours, "bare_loop": bare, "share": ours / bare, "images": len(features)}


def memory(options: argparse.Namespace, scratch: Path) -> dict:
    """Peak memory at 200 images and at ten times as many."""
    peaks = [
        run(options, many(options.photos, scratch / "photos", count), scratch / "f.h5")["peak_mib"]
        for count in (options.count, 10 * options.count)
    ]
    return {"images": options.count, "peak_mib": peaks, "ratio": peaks[1] / peaks[0]}


def int8(options: argparse.Namespace, scratch: Path) -> dict:
    """Cosine of int8 against float32 features, at every location."""
    from brixel_cli import FeatureFile

    folder = many(options.photos, scratch / "photos", options.count)
    files = []
    for dtype in ("float32", "int8"):
        run(options, folder, scratch / f"{dtype}.h5", "--dtype", dtype)
        files.append(FeatureFile(scratch / f"{dtype}.h5"))
    cosines = []
    for row in files[0].rows:
        exact, rounded = files[0][row], files[1][row]
        norms = np.linalg.norm(exact, axis=0) * np.linalg.norm(rounded, axis=0)
        cosines.append((exact * rounded).sum(axis=0).ravel() / norms.ravel())
    every = np.concatenate(cosines)
    return {"images": len(cosines), "mean": float(every.mean()), "worst": float(every.min())}


def writing(options: argparse.Namespace, scratch: Path) -> dict:
    """Rows through the store against one plain sequential file, both allocated before and synced after: MB/s.

    The two are interleaved, in changing order, each on a disk that has settled; the median of the rounds counts.
    """
    from brixel_cli.data.columns import Column
    from brixel_cli.data.row_store import Store, create_store

    row = np.random.default_rng(0).integers(0, 255, 12_600_000, np.uint8)
    count = options.count

    def plain(path: Path) -> float:
        with open(path, "wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, row.nbytes * count)
            os.sync()
            began = time.perf_counter()
            for _ in range(count):
                file.write(row)
            os.fsync(file.fileno())
            return time.perf_counter() - began

    def rows(path: Path) -> float:
        create_store(path, count, {"features": Column(row.shape, "uint8")}, {})
        store = Store(path, writable=True)
        os.sync()
        began = time.perf_counter()
        for number in range(count):
            store.write([number], {"features": [row]})
        store.flush()
        return time.perf_counter() - began

    seconds: dict[str, list[float]] = {"plain": [], "rows": []}
    for turn in range(8):
        for way in (plain, rows) if turn % 2 else (rows, plain):
            taken = way(scratch / "written")
            (scratch / "written").unlink()
            if turn:  # the first turn warms up
                seconds[way.__name__].append(taken)
    speeds = {name: row.nbytes * count / float(np.median(values)) / 1e6 for name, values in seconds.items()}
    return {**speeds, "share": speeds["rows"] / speeds["plain"], "seconds": seconds}


def processes(options: argparse.Namespace, scratch: Path) -> dict:
    """One process against two under torchrun, with as many threads each."""
    folder = many(options.photos, scratch / "photos", options.count)
    os.environ["OMP_NUM_THREADS"] = "1"
    run(options, folder, scratch / "one.h5")
    (scratch / "two.h5").unlink(missing_ok=True)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "brixel_cli",
    ]
    subprocess.run(
        [*launch, *command(options, folder, scratch / "two.h5", "--device", "cpu")], check=True, capture_output=True
    )
    return {"images": options.count, "identical": rows_of(scratch / "one.h5") == rows_of(scratch / "two.h5")}


BARS = {bar.__name__: bar for bar in (throughput, memory, int8, writing, processes)}
COUNTS = {"throughput": 500, "memory": 200, "int8": 50, "writing": 100, "processes": 20}


def main() -> None:
    """Measure one bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bar", choices=BARS)
    parser.add_argument("--photos", type=Path, default=Path("photos"))
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/brixel_bars"))
    parser.add_argument("--res", type=int, default=448)
    parser.add_argument("--count", type=int)
    parser.add_argument("--source", default="student")
    parser.add_argument("--checkpoint")
    parser.add_argument("--backbone")
    parser.add_argument("--backbone-weights")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--batch-size")
    options = parser.parse_args()
    options.count = options.count or COUNTS.get(options.bar, 0)
    options.scratch.mkdir(parents=True, exist_ok=True)
    result = BARS[options.bar](options, options.scratch)
    sys.stdout.write(json.dumps({"bar": options.bar, **result}) + "\n")


if __name__ == "__main__":
    main()
