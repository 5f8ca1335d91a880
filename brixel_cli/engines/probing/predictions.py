"""Predictions of other models as rows of a probe: read from files, checked, and measured as those of a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from brixel_cli.config.labelled import ProbeRecipe
from brixel_cli.core.files import make_folder, replacing, save_picture
from brixel_cli.core.formatting import human_size
from brixel_cli.data.crops import cut_target
from brixel_cli.data.dataset_files import first_lines
from brixel_cli.data.predictions import check_counted, depth_scale, prediction_file, read_prediction
from brixel_cli.data.row_store import Array
from brixel_cli.drawing.predictions import class_colours
from brixel_cli.engines.probing.evaluation import Predict
from brixel_cli.engines.probing.features import Targets
from brixel_cli.engines.probing.plan import Size, SplitPlan
from brixel_cli.engines.probing.sources import PredictionSource
from brixel_cli.errors import BrixelError


def reader(
    recipe: ProbeRecipe, source: PredictionSource, seed: int, split: SplitPlan, targets: Targets | None = None
) -> Predict:
    """What reads the predictions of a seed.

    A file has the size of the image, of which the part that is evaluated is taken as it is of labels; or it has the
    size of that part.

    Args:
        recipe: of the labelled set.
        source: of the predictions.
        seed: which of its folders.
        split: that is evaluated.
        targets: of the split: a prediction needs a value wherever they have one; None: that is not looked at.

    Returns:
        As `evaluation.predict`; a BrixelError is raised for a file that cannot be used.
    """
    scale = depth_scale(source.folders[seed], source.config)

    def predict(image: int, size: Size) -> dict[str, Tensor]:
        row = split.target_row(image)
        found: dict[str, Tensor] = {}
        for quantity, paths in source.files[seed].items():
            path = paths[image]
            values: Array = read_prediction(path, quantity, recipe, source.config, scale)
            whole, shape = split.labelled.size(image), values.shape[-2:]
            if shape == whole and not split.slides:
                values = cut_target(values, split.crops[row], size)
            elif shape not in (whole, size):
                part = f", or {human_size(size)}, what is evaluated of it" if size != whole else ""
                raise BrixelError(
                    f"{path} is {human_size(shape)} pixels (height x width), but {split.labelled.names[image]} is "
                    f"{human_size(whole)}: a prediction needs the size of its image{part}."
                )
            if targets is not None:
                check_counted(path, quantity, values, targets.view(quantity, row))
            found[quantity] = torch.from_numpy(values)
        return found

    return predict


def check_predictions(recipe: ProbeRecipe, source: PredictionSource, split: SplitPlan, bar: Any) -> None:
    """Read every file once, before anything is computed; the bar hears of each image.

    Raises:
        BrixelError: files cannot be used; it names the first of them.
    """
    for seed, folder in enumerate(source.folders):
        predict, errors = reader(recipe, source, seed, split), []
        for image in range(len(split.labelled)):
            try:
                predict(image, split.target_sizes[split.target_row(image)])
            except BrixelError as error:
                errors.append(str(error))
            bar.update(1)
        if errors:
            raise BrixelError(
                f"{len(errors)} of the {len(split.labelled)} predictions in {folder} cannot be used:\n"
                f"{first_lines(errors)}"
            )


def write_predictions(predict: Predict, output: Path, split: SplitPlan, bar: Any) -> None:
    """Write what a source predicts of the evaluated images, exactly, so that `reader` gives it back.

    Args:
        predict: makes the predictions.
        output: folder for a folder of each quantity: masks as PNG, depth in metres and normals as float32 in .npy.
        split: that is evaluated; the files have the size of what is evaluated of each image.
        bar: hears of each image.

    Raises:
        BrixelError: a file cannot be written.
    """
    for image, name in enumerate(split.labelled.names):
        for quantity, values in predict(image, split.target_sizes[split.target_row(image)]).items():
            path = prediction_file(output, quantity, name)
            make_folder(path.parent)
            if quantity == "segmentation":
                mask = Image.fromarray(values.numpy().astype(np.uint8))
                mask.putpalette(class_colours().tobytes())
                save_picture(mask, path)
            else:
                with replacing(path) as partial, partial.open("wb") as file:
                    np.save(file, values.float().numpy())
        bar.update(1)
