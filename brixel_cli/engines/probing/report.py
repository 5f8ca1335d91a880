"""What a probe leaves for the eye: loss curves, and pictures of the best, the median and the worst image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from brixel_cli.core.files import save_picture, write_text
from brixel_cli.core.heads import QUANTITIES
from brixel_cli.core.probe_metrics import HIGHER_IS_BETTER, LEADING
from brixel_cli.data.crops import cut_image
from brixel_cli.data.images import load_image
from brixel_cli.drawing.curves import draw_curves
from brixel_cli.drawing.feature_maps import panel
from brixel_cli.drawing.feature_page import PageImage, feature_page
from brixel_cli.drawing.predictions import comparison
from brixel_cli.engines.probing.features import Targets, open_maps
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.plan import ProbePlan, SourcePlan
from brixel_cli.engines.probing.runs import predictor
from brixel_cli.engines.probing.sources import FileSource, ModelSource
from brixel_cli.engines.runtime import Runtime


def write_curves(folder: ProbeFolder, labels: Sequence[str], seeds: Sequence[int]) -> None:
    """Draw the loss curves of all sources and seeds that there are; nothing where nothing was trained."""
    curves = {label: [curve for seed in seeds if (curve := folder.read_curve(label, seed))] for label in labels}
    trained = {label: some for label, some in curves.items() if some}
    if trained:
        draw_curves(folder.curves, trained)


def write_pictures(folder: ProbeFolder, plan: ProbePlan, runtime: Runtime) -> list[Path]:
    """Draw image, truth, and each source's prediction and errors, for the best, the median and the worst image.

    The images are ranked by the reference source; predictions are those of the first seed. Where an image is seen as a
    whole, not through several windows, the page of features has it too, with truth and predictions as layers.
    """
    reference = reference_source(plan)
    ranking = folder.read_images(reference.source.label, 0)
    written, seen = [], []
    quantities = QUANTITIES[plan.options.recipe.task]  # none where nothing is trained
    drawn = plan.sources if quantities else []
    predictors = {item.source.label: predictor(folder, plan, item, 0, runtime) for item in drawn}
    for quantity in quantities:
        metric = LEADING[quantity]
        for place, number in ranked_images(ranking, metric).items():
            row = reference.evaluate.target_row(number)
            targets = Targets(reference.evaluate, plan.options.recipe.task)
            truth = targets.read(row)[quantity]
            predictions = {
                label: predict(number, targets.sizes[row])[quantity] for label, predict in predictors.items()
            }
            titles, rows = comparison(quantity, _image(reference, row), truth, predictions)
            value = ranking[number][metric]
            path = folder.pictures / f"{quantity}_{place}.png"
            titles[0] = f"{place}: {metric} {value:.3f}"
            save_picture(panel(titles, rows), path)
            written.append(path)
            if not reference.evaluate.slides:
                layers = {
                    "truth": rows[1][0],
                    **dict(zip((f"predicted: {label}" for label in predictions), rows[0][1:], strict=True)),
                }
                name = f"{titles[0]}, {reference.evaluate.labelled.names[number]}"
                seen.append(PageImage(name, rows[0][0], _maps(plan, number), layers))
    if any(image.maps for image in seen):
        write_text(folder.page, feature_page(f"Features of the probe {plan.options.recipe.name}", seen).html)
    return written


def _maps(plan: ProbePlan, number: int) -> dict[str, Tensor]:
    """The stored maps of an evaluated image that is seen as a whole, by source."""
    found = {}
    for item in plan.sources:
        if isinstance(item.source, ModelSource | FileSource):
            found[item.source.label] = open_maps(item, item.evaluate).read(item.evaluate.positions[number][:1])[0]
    return found


def _image(item: SourcePlan, row: int) -> Image.Image:
    """What is seen of an image in evaluation, at the size of its target."""
    split = item.evaluate
    number = row if split.slides else split.crops[row].row
    image = load_image(split.labelled.root / split.labelled.names[number])
    height, width = split.target_sizes[row]
    if not split.slides:
        crop = split.crops[row]
        times = max(round(height / crop.size[0]), 1)
        image = cut_image(image, crop, (crop.size[0] * times, crop.size[1] * times))
    return image.resize((width, height), Image.Resampling.BICUBIC)


def ranked_images(images: Sequence[dict[str, float]], metric: str) -> dict[str, int]:
    """The `best`, `median` and `worst` image by a metric, by their numbers; images where it is nan are left out."""
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    order = sorted(
        (number for number, image in enumerate(images) if not math.isnan(image[metric])),
        key=lambda number: sign * images[number][metric],
    )
    if not order:
        return {}
    return {"best": order[0], "median": order[(len(order) - 1) // 2], "worst": order[-1]}


def reference_source(plan: ProbePlan) -> SourcePlan:
    """The source whose figures rank the images: the teacher, else the first student, else the first source."""
    for kind in ("teacher", "student"):
        for item in plan.sources:
            if item.source.kind == kind:
                return item
    return plan.sources[0]
