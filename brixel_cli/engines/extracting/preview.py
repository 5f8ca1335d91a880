"""Pictures of extracted features: image beside colours, in one basis for the whole set; a contact sheet; videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from brixel_cli.core.files import make_folder, save_picture
from brixel_cli.core.pca import RunningPca
from brixel_cli.data.feature_file import FeatureFile
from brixel_cli.data.feature_layout import picture_names
from brixel_cli.data.video import write_video
from brixel_cli.drawing.feature_maps import Palette, contact_sheet, side_by_side
from brixel_cli.engines.extracting.plan import CONTACT_SHEET, ExtractPlan, preview_folder
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import BrixelError

BASIS_IMAGES = 64
RANGE_IMAGES = 16
SHEET_IMAGES = 48


def write_previews(features: FeatureFile, plan: ExtractPlan, reporter: Reporter) -> list[Path]:
    """Write a picture for each image that has features, a contact sheet of up to 48 of them, and an MP4 for each video.

    The colours are the first three principal components over a sample of the set, so that equal colours mean equal
    features in all pictures.

    Returns:
        The contact sheet, the folder, and the videos.
    """
    rows = features.rows
    if not rows:
        return []
    folder, palette = preview_folder(plan.output), _palette(features)
    names = picture_names(features.paths)
    on_sheet = set(spread(rows, SHEET_IMAGES))
    pairs: list[tuple[Image.Image, Image.Image]] = []
    with reporter.bar("preview", len(rows), unit="image") as bar:
        for row in rows:
            colours = palette.paint(torch.from_numpy(features[row]))
            pair = (_seen(plan, features, row), colours)
            path = folder / names[row]
            make_folder(path.parent)
            save_picture(side_by_side(*pair), path)
            if row in on_sheet:
                pairs.append(pair)
            bar.update(1)
    sheet = folder / CONTACT_SHEET
    save_picture(contact_sheet(pairs), sheet)
    return [sheet, folder, *_write_videos(plan, rows, {row: folder / names[row] for row in rows}, folder)]


def _write_videos(plan: ExtractPlan, rows: list[int], pictures: dict[int, Path], folder: Path) -> list[Path]:
    """The pictures of each video's frames as a video at the source's speed, under the name that it has among inputs."""
    videos = []
    for source, video in plan.inputs.videos.items():
        frames = [(item.frame, row) for row in rows if (item := plan.inputs.items[row]).path == source]
        if not frames:
            continue
        name = plan.inputs.items[frames[0][1]].name.rpartition("#")[0]
        path = folder / (name if name.lower().endswith(".mp4") else f"{name}.mp4")
        write_video(path, ((number or 0, Image.open(pictures[row])) for number, row in frames), video.rate)
        videos.append(path)
    return videos


def _palette(features: FeatureFile) -> Palette:
    gathered = RunningPca(features[features.rows[0]].shape[0])
    for row in spread(features.rows, BASIS_IMAGES):
        gathered.add(torch.from_numpy(features[row]))
    return Palette.fit(
        gathered.basis(3), [torch.from_numpy(features[row]) for row in spread(features.rows, RANGE_IMAGES)]
    )


def _seen(plan: ExtractPlan, features: FeatureFile, row: int) -> Image.Image:
    """What the model saw of an image; grey where the file has gone since."""
    try:
        seen: Image.Image = to_pil_image(plan.pixels(row))
        return seen
    except BrixelError:
        height, width = (int(side) for side in features.model_size[row])
        return Image.new("RGB", (width, height), "grey")


def spread(rows: list[int], most: int) -> list[int]:
    """At most so many of the rows, evenly spread."""
    places = np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)
    return [rows[place] for place in places]
