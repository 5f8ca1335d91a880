"""Shards that are killed, memory, how long a joined file takes to open, and a list of many names to plan.

    python tests/measure/cluster_bars.py shards --count 10000      # 16 tars in a bucket, 4 shards, each killed twice
    python tests/measure/cluster_bars.py memory --count 10000      # peak of one process for a tenth of these, and for all
    python tests/measure/cluster_bars.py joining --count 1000      # parts of one row each
    python tests/measure/cluster_bars.py planning --count 1000000  # names, of which one shard in 64 is looked at

Each prints one line of JSON. The model of `shards` and `memory` is timm's test_vit with random weights, at 64 px, on one
thread. Seconds of `joining` are those of the processor; those of `planning` are of the whole command with `--dry-run`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import Listener
from input_bars import make_images, s3_server
from test_joining import tiny_part

from brixel_cli.data.feature_file import FeatureFile
from brixel_cli.data.row_store import DONE, Store
from brixel_cli.engines.extracting.joining import join
from brixel_cli.errors import BrixelError

NUM_SHARDS, NUM_TARS, BATCH = 4, 16, 25


def joining(folder: Path, count: int) -> dict[str, Any]:
    for number in range(1, count + 1):
        tiny_part(folder, number, count, rows=1)
    began = time.process_time()
    join(str(folder / "tiny.*.h5"), folder / "tiny.h5", False, False, Listener())
    joined = time.process_time()
    features = FeatureFile(folder / "tiny.h5")
    opened = time.process_time()
    right = all(float(features[row].max()) == row + 1 for row in range(count))
    return {"parts": count, "join_s": joined - began, "open_s": opened - joined, "rows_are_right": right}


def weights_of(folder: Path) -> list[str]:
    """The options of a model that costs little beside the reading."""
    import timm
    from safetensors.torch import save_file

    path = folder / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return ["--source", "backbone", "--backbone", "test_vit", "--backbone-weights", str(path), "--res", "64"]


def command(reference: str, output: Path, model: Sequence[str], *more: str) -> list[str]:
    start = [sys.executable, "-m", "brixel_cli", "extract", "--input", reference, "--output", str(output), *model]
    return [*start, "--batch-size", str(BATCH), "--device", "cpu", "--workers", "2", "--quiet", *more]


def ended(words: Sequence[str]) -> tuple[int, float]:
    """Run a command; its largest private memory in MiB, by samples, and seconds."""
    began, peak = time.perf_counter(), 0
    process = psutil.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            now = process.memory_info()
            peak = max(peak, now.rss - now.shared)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.02)
    assert process.wait() == 0, words
    return peak >> 20, time.perf_counter() - began


def num_done(path: Path) -> int:
    try:
        return int((Store(path).status == DONE).sum())
    except (BrixelError, OSError):
        return 0


def killed_twice(words: Sequence[str], part: Path, count: int, seed: int) -> list[int]:
    """Run the command of a shard, kill it twice, and run it to its end; how many rows were done at each kill."""
    chosen, done = random.Random(seed), []
    begun = part.with_name(f"{part.name}.unfinished")
    for least in (0.05, 0.5):
        target = max(int(count * chosen.uniform(least, least + 0.4)), 1)
        process = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        while process.poll() is None and num_done(begun) < target:
            time.sleep(0.02)
        process.kill()
        process.wait()
        done.append(num_done(begun))
    subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
    return done


def shards(folder: Path, count: int) -> dict[str, Any]:
    """Parts from tars in a bucket, of processes that are killed, against one process from a folder."""
    import boto3

    make_images(folder / "photos", count, side=(120, 160))
    files, model = sorted((folder / "photos").iterdir()), weights_of(folder)
    ended(command(str(folder / "photos"), folder / "whole.h5", model))
    whole, line = FeatureFile(folder / "whole.h5"), {"images": count}
    with s3_server() as endpoint:
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="bucket")
        for number in range(NUM_TARS):
            with tarfile.open(folder / "one.tar", "w") as tar:
                for path in files[number * count // NUM_TARS : (number + 1) * count // NUM_TARS]:
                    tar.add(path, path.name)
            client.upload_file(str(folder / "one.tar"), "bucket", f"photos-{number:02}.tar")
        for name, at_once in (("one", 1), ("two", 2)):
            output = folder / name / "photos.h5"

            def run(shard: int, output: Path = output) -> list[int]:
                reference = f"s3://bucket/photos-{{00..{NUM_TARS - 1}}}.tar"
                part = output.with_name(f"photos.{shard:05}-of-{NUM_SHARDS:05}.h5")
                words = command(reference, output, model, "--shard", f"{shard}/{NUM_SHARDS}")
                return killed_twice(words, part, count // NUM_SHARDS, shard)

            with ThreadPoolExecutor(at_once) as pool:
                kills = list(pool.map(run, range(1, NUM_SHARDS + 1)))
            joined = join(str(folder / name / "photos.*.h5"), folder / name / "all.h5", False, False, Listener())
            found = FeatureFile(joined.output)
            names = [Path(path).name for path in found.paths]
            same = sum(bool((found[row] == whole[name]).all()) for row, name in enumerate(names))
            line[f"{name}_at_once"] = {"rows_done_at_kills": kills, "rows_equal": same, "order_equal": names == whole.paths,
                                       "done": len(found.rows)}  # fmt: skip
    return line


def memory(folder: Path, count: int) -> dict[str, Any]:
    make_images(folder / "photos", count, side=(120, 160))
    files, model = sorted((folder / "photos").iterdir()), weights_of(folder)
    peaks = {}
    for size in (count // 10, count):
        with tarfile.open(folder / f"{size}.tar", "w") as tar:
            for path in files[:size]:
                tar.add(path, path.name)
        peaks[size] = ended(command(str(folder / f"{size}.tar"), folder / f"{size}.h5", model))[0]
    return {"private_MiB_by_images": peaks, "ratio": round(peaks[count] / peaks[count // 10], 3)}


def planning(folder: Path, count: int) -> dict[str, Any]:
    make_images(folder / "one", 1, side=(120, 160))
    names = [f"photos/{number // 1000:04d}/{number:07d}.jpg" for number in range(count)]
    (folder / "all.txt").write_text("\n".join(names))
    for name in names[: count // 64]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / "one" / "00000.jpg", folder / name)
    words = command(str(folder / "all.txt"), folder / "all.h5", weights_of(folder), "--shard", "1/64", "--dry-run")
    peak, seconds = ended(words)
    return {"names": count, "of_the_shard": count // 64, "seconds": round(seconds, 1), "private_MiB": peak}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["shards", "memory", "joining", "planning"])
    parser.add_argument("--count", type=int, default=1000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bars = {"shards": shards, "memory": memory, "joining": joining, "planning": planning}
        done = bars[asked.what](Path(folder), asked.count)
    sys.stdout.write(json.dumps(done) + "\n")
