"""How long a joined file takes to make and to open, and a list of many names to plan.

    python tests/measure/cluster_bars.py joining --count 1000     # parts of one row each
    python tests/measure/cluster_bars.py planning --count 1000000  # names, of which one shard in 64 is looked at

Each prints one line of JSON. Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import Listener
from test_joining import tiny_part

from brixel_cli.config.shard import Shard
from brixel_cli.data.feature_file import FeatureFile
from brixel_cli.data.inputs import find_inputs
from brixel_cli.engines.extracting.joining import join


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


def planning(folder: Path, count: int) -> dict[str, Any]:
    names = "\n".join(f"photos/{number // 1000:04d}/{number:07d}.jpg" for number in range(count))
    (folder / "all.txt").write_text(names)
    del names
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = find_inputs([str(folder / "all.txt")], 1, shard=Shard(1, 64))
    seconds, peak = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"names": count, "of_the_shard": len(found.items), "seconds": seconds, "before_MiB": before / 1024,
            "peak_MiB": peak / 1024}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["joining", "planning"])
    parser.add_argument("--count", type=int, default=1000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = {"joining": joining, "planning": planning}[asked.what](Path(folder), asked.count)
    sys.stdout.write(json.dumps(done) + "\n")
