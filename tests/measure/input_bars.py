"""How fast images come from a folder, a tar, a bucket and a parquet file; prints JSON for docs/INPUTS.md.

    python tests/measure/input_bars.py reader
    python tests/measure/input_bars.py extract --backbone-weights demo/dinov2_vits14.safetensors

`reader` has no model: images are decoded and resized to 112 pixels, beside the loader of the package webdataset, which does
the same. `extract` is the whole extraction at 112 pixels. The sources are interleaved, in changing order; the figures are
medians over the rounds, and of extract also the ratio to the folder, round by round. The bucket is one of moto's S3 server,
a process of its own on the same cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

RES, PATCH, WORKERS = 112, 14, 2
TARS, BRACED = 4, "photos-{0..3}.tar"


def make_images(folder: Path, count: int, side: tuple[int, int] = (480, 640)) -> None:
    """JPEGs of this height and width with smooth colours and some grain; about 70 KB each at 640x480 pixels."""
    folder.mkdir()
    y, x = np.mgrid[0 : side[0], 0 : side[1]] / side[1]
    for number in range(count):
        rng = np.random.default_rng(number)
        waves = [np.sin(rng.uniform(3, 30) * x + rng.uniform(3, 30) * y + phase) for phase in range(3)]
        pixels = 128 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 8, (*side, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=88)


def make_sources(scratch: Path, count: int, endpoint: str) -> dict[str, str]:
    """The same images in every form; the references by name of the source."""
    import boto3
    import pyarrow as pa
    from pyarrow import parquet

    folder = scratch / "photos"
    make_images(folder, count)
    files = sorted(folder.iterdir())
    for number in range(TARS):
        with tarfile.open(scratch / f"photos-{number}.tar", "w") as tar:
            for path in files[number * count // TARS : (number + 1) * count // TARS]:
                tar.add(path, path.name)
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    parquet.write_table(pa.table({"image": rows}), scratch / "photos.parquet", row_group_size=100)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="bucket")
    for path in files:
        client.upload_file(str(path), "bucket", f"photos/{path.name}")
    for number in range(TARS):
        client.upload_file(str(scratch / f"photos-{number}.tar"), "bucket", f"photos-{number}.tar")
    return {
        "folder": str(folder),
        "tar": str(scratch / BRACED),
        "parquet": str(scratch / "photos.parquet"),
        "S3 objects": "s3://bucket/photos",
        "S3 tar": f"s3://bucket/{BRACED}",
    }


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """moto's server in a process of its own; its address. The environment gets made-up credentials for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    start = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    server = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1",
                   "AWS_ENDPOINT_URL": endpoint}  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield endpoint
    finally:
        server.terminate()
        server.wait()


def read_ours(reference: str) -> int:
    """Decode and resize all images of a source as extract does, sizes known before; the number."""
    from brixel_cli.data.inputs import find_inputs
    from brixel_cli.data.resizing import Resizing
    from brixel_cli.engines.streams import read_ahead

    found, resizing = find_inputs([reference], 1), Resizing(RES, "short", PATCH)
    global began
    began = time.perf_counter()  # headers were read before

    def load(row: int) -> int:
        with found.decoded(found.items[row]) as image:
            return int(resizing.apply(image).shape[0])

    rows = range(len(found.items))
    chunks = [rows[at : at + 32] for at in range(0, len(rows), 32)]
    with found.fetched_ahead(found.items):
        return sum(len(loaded) for _, loaded in read_ahead(chunks, load, WORKERS, polite=False))


def read_webdataset(path: str) -> int:
    """The same by the package webdataset, with as many worker processes as we have threads, a tar at a time each."""
    import webdataset

    from brixel_cli.data.resizing import Resizing

    resizing = Resizing(RES, "short", PATCH)

    def decode(sample: dict[str, bytes]) -> int:
        return int(resizing.apply(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")).shape[0])

    dataset = webdataset.WebDataset(path, shardshuffle=False).map(decode)
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=WORKERS)
    global began
    began = time.perf_counter()
    return sum(1 for _ in loader)


began = 0.0


def reader(options: argparse.Namespace, sources: dict[str, str]) -> dict[str, object]:
    """Images per second of each source, without a model."""
    calls: dict[str, Callable[[], int]] = {name: lambda at=at: read_ours(at) for name, at in sources.items()}
    calls["webdataset, tar"] = lambda: read_webdataset(sources["tar"])
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(options.rounds + 1):
        names = list(calls) if turn % 2 else list(calls)[::-1]
        for name in names:
            count = calls[name]()
            rate = count / (time.perf_counter() - began)
            assert count == options.count, name
            if turn:  # the first warms up
                rates[name].append(rate)
    return {"images_per_second": {name: summary(values) for name, values in rates.items()}}


def extract(options: argparse.Namespace, sources: dict[str, str]) -> dict[str, object]:
    """Images per second of whole extractions, and their ratio to the folder's."""
    from brixel_cli.config.extract import ExtractOptions
    from brixel_cli.engines.extracting import extraction
    from brixel_cli.engines.reporting import Silent

    rates: dict[str, list[float]] = {name: [] for name in sources}
    for turn in range(options.rounds + 1):
        names = list(sources) if turn % 2 else list(sources)[::-1]
        for name in names:
            output = options.scratch / "features.h5"
            done = extraction.extract(
                ExtractOptions([sources[name]], res=RES, checkpoint="dinov2_vits14", device="cpu", overwrite=True,
                               backbone_weights=options.backbone_weights, output=output, batch_size=16), Silent())  # fmt: skip
            assert done.num_computed == options.count, name
            if turn:
                rates[name].append(done.num_computed / done.seconds)
    ratios = {
        name: summary([rate / base for rate, base in zip(values, rates["folder"], strict=True)], 3)
        for name, values in rates.items()
    }
    return {"images_per_second": {name: summary(values) for name, values in rates.items()}, "ratio_to_folder": ratios}


def summary(values: list[float], digits: int = 1) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(float(np.median(values)), digits),
        "least": round(min(values), digits),
        "most": round(max(values), digits),
    }


def main() -> None:
    """Measure one bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bar", choices=("reader", "extract"))
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backbone-weights", default="demo/dinov2_vits14.safetensors")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, s3_server() as endpoint:
        options.scratch = Path(scratch)
        sources = make_sources(options.scratch, options.count, endpoint)
        result = {"reader": reader, "extract": extract}[options.bar](options, sources)
    sys.stdout.write(json.dumps({"bar": options.bar, "images": options.count, **result}) + "\n")


if __name__ == "__main__":
    main()
