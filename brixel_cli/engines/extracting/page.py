"""The page of extracted features: images of the set, with the maps of one or several sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from brixel_cli.config.extract import Source
from brixel_cli.core.files import check_disk, make_folder, write_text
from brixel_cli.core.formatting import human_bytes
from brixel_cli.data.feature_file import FeatureFile
from brixel_cli.data.resizing import Resizing
from brixel_cli.drawing.feature_page import LARGEST_PICTURE, PageImage, feature_page
from brixel_cli.engines.extracting.plan import ExtractPlan, model_of
from brixel_cli.engines.extracting.preview import spread
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.engines.reporting import Reporter
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError


def write_page(features: FeatureFile, plan: ExtractPlan, runtime: Runtime, reporter: Reporter) -> Path:
    """Write the page that `--page` asks for; maps of the file's own source are read, only others are computed.

    Raises:
        BrixelError: no image has features, an image cannot be read any more, or the page does not fit on the disk.
    """
    options = plan.options
    assert options.page is not None
    rows = spread(features.rows, options.page_images)
    if not rows:
        raise BrixelError(f"{options.page}: none of the images has features, so there is no page.")
    maps: dict[Source, list[Tensor]] = {}
    model: FeatureExtractor | None = None  # of the backbone, which is the teacher's as well
    for source in options.sources_of_page:
        if source == plan.spec.source:
            maps[source] = [_stored(features, row) for row in rows]
            continue
        checkpoint = str(plan.spec.stored.path) if plan.spec.stored else options.checkpoint
        spec = model_of(replace(options, source=source, checkpoint=checkpoint), reporter)
        if model is None or source == "student":
            model = FeatureExtractor(spec, runtime, reporter, 1)
        resizing = Resizing(options.res, options.fit, spec.patch_size, spec.enlarge)
        maps[source] = _computed(plan, rows, resizing, model, f"maps of the {source}")
        model = None if source == "student" else model
    images = [
        PageImage(features.paths[row], _picture(plan, row), {source: some[n] for source, some in maps.items()})
        for n, row in enumerate(rows)
    ]
    shown = [plan.inputs.items[row] for row in rows]
    of = shown[0].path if len({item.path for item in shown}) == 1 else plan.inputs.root
    page = feature_page(f"Features of {of.name}", images, video=all(item.frame is not None for item in shown))
    size = len(page.html.encode())
    reporter.say(
        f"{options.page}: {len(rows)} images, {human_bytes(size)}; its heat maps correlate by {page.correlation:.4f} "
        f"with those of all channels, at worst by {page.worst:.4f} ({page.worst_of})"
    )
    make_folder(options.page.absolute().parent)
    check_disk(options.page.absolute().parent, size, str(options.page))
    write_text(options.page, page.html)
    return options.page


def _stored(features: FeatureFile, row: int) -> Tensor:
    """A map (D, h, w) of the file; scores of principal components become features again."""
    map_ = torch.from_numpy(features[row])
    if features.pca is None:
        return map_
    components, mean = (torch.from_numpy(array) for array in features.pca)
    return torch.einsum("khw,dk->dhw", map_, components) + mean[:, None, None]


def _computed(
    plan: ExtractPlan, rows: Sequence[int], resizing: Resizing, model: FeatureExtractor, title: str
) -> list[Tensor]:
    maps = []
    with model.reporter.bar(title, len(rows), unit="image") as bar:
        for row in rows:
            maps.append(model.maps(plan.pixels(row, resizing)[None])[0].cpu())
            bar.update(1)
    return maps


def _picture(plan: ExtractPlan, row: int) -> Image.Image:
    """What the maps of an image cover, at a size for the eye."""
    item = plan.inputs.items[row]
    short, long = sorted((item.height, item.width))
    side = short if plan.options.fit != "short" else min(short, round(LARGEST_PICTURE * short / long))
    resizing = Resizing(min(side, LARGEST_PICTURE), plan.options.fit, 1)
    picture: Image.Image = to_pil_image(plan.pixels(row, resizing))
    return picture
