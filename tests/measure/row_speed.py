"""Compare the speed of rows with that of another commit: python tests/measure/row_speed.py CHECKOUT [--rounds 15]

CHECKOUT is a clone of brixel at that commit, such as the last one without checksums. Rows are written, a batch at a time,
and read; and whole extractions of the plain backbone at 448 px are run. Both take turns. Each is a
process of its own, and its processor time counts, which other work on the machine changes little. Prints the ratio of
this checkout to the other, its median and quartiles over the rounds, as a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parents[2]
ROWS, BATCH, SHAPE = 256, 8, (384, 32, 32)
CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np
try:
    from brixel_cli.data.columns import Column
    single = False
except ImportError:  # before rows were written several at once
    from brixel_cli.data.row_store import Column
    single = True
from brixel_cli.data.row_store import Store, create_store
from brixel_cli import FeatureFile
path, stored, rows, batch, shape = json.loads(sys.argv[1])
values = list(np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float16))
def write():
    Path(path).unlink(missing_ok=True)
    create_store(Path(path), rows, {"features": Column(tuple(shape), "float16")}, {})
    store = Store(Path(path), writable=True)
    began = time.process_time()
    for first in range(0, rows, batch):
        if single:
            for row in range(batch):
                store.write(first + row, {"features": values[row]})
        else:
            store.write(list(range(first, first + batch)), {"features": values})
    store.flush()
    return time.process_time() - began
def read():
    features = FeatureFile(stored)
    began = time.process_time()
    for _ in range(20):
        for row in features.rows:
            features[row]
    return time.process_time() - began
for line in sys.stdin:
    print({"write": write, "read": read}[line.strip()](), flush=True)
"""


def environment(checkout: Path) -> dict[str, str]:
    """For a process that uses the code of a checkout."""
    return {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


def extraction(checkout: Path, options: argparse.Namespace, output: Path) -> float:
    """Processor seconds of `brixel extract`."""
    output.unlink(missing_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "brixel_cli", "extract", "--input", str(options.photos), "--res", "448", "--device", "cpu",
               "--source", "backbone", "--backbone", options.backbone, "--backbone-weights", options.backbone_weights, "--output", str(output)]  # fmt: skip
    subprocess.run(command, env=environment(checkout), cwd=output.parent, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--extractions", type=int, default=5, help="rounds of whole extractions")
    parser.add_argument("--photos", type=Path, default=HERE / "demo" / "photos" / "training")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--backbone-weights", default=str(HERE / "demo" / "dinov2_vits14.safetensors"))
    options = parser.parse_args()
    checkouts = {"other": options.checkout.resolve(), "this": HERE}
    ratios: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        whole = ["extract"] * bool(options.extractions)
        stored = scratch / "stored.h5"
        extraction(checkouts["other"], options, stored)
        children = {}
        for name, checkout in checkouts.items():
            sizes = json.dumps([str(scratch / f"{name}.h5"), str(stored), ROWS, BATCH, SHAPE])
            children[name] = subprocess.Popen([sys.executable, "-c", CHILD, sizes], env=environment(checkout), text=True,
                                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        for what in ("write", "read", *whole):
            for turn in range(options.extractions if what == "extract" else options.rounds):
                seconds = {}
                for name in ("other", "this") if turn % 2 else ("this", "other"):
                    if what == "extract":
                        seconds[name] = extraction(checkouts[name], options, scratch / "out.h5")
                        continue
                    child = children[name]
                    assert child.stdin is not None
                    assert child.stdout is not None
                    child.stdin.write(f"{what}\n")
                    child.stdin.flush()
                    seconds[name] = float(child.stdout.readline())
                if turn:  # the first round warms up
                    ratios.setdefault(what, []).append(seconds["this"] / seconds["other"])
                    sys.stderr.write(f"{what} {seconds}\n")
        for child in children.values():
            assert child.stdin is not None
            child.stdin.close()
            child.wait()
    sys.stdout.write(
        "| processor time, this commit / the other | median | quartiles | rounds |\n|---|---:|---:|---:|\n"
    )
    for what, values in ratios.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        sys.stdout.write(f"| {what} | {middle:.3f} | {low:.3f} to {high:.3f} | {len(values)} |\n")


if __name__ == "__main__":
    main()
