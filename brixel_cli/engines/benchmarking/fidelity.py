"""How faithful the rows of one model and size are to its teacher, image by image; some are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from brixel_cli.core.backbone import Backbone
from brixel_cli.core.files import make_folder, save_picture, write_text
from brixel_cli.core.formatting import human_size
from brixel_cli.core.losses import Basis
from brixel_cli.core.metrics import FIDELITY, fidelity, fidelity_basis, gap_over_images, gaps_by_domain
from brixel_cli.data.views import Views, normalise_pixels, resize_view
from brixel_cli.drawing.feature_maps import denormalise, panel, pca_colours
from brixel_cli.drawing.feature_page import PageImage, feature_page
from brixel_cli.engines.benchmarking.methods import Method
from brixel_cli.engines.benchmarking.probes import known
from brixel_cli.engines.benchmarking.results import Fidelity, ImageFidelity, Picture, Size
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import BrixelError

COSINE_PERCENTILE = 0.05
MOST_LOCATIONS = 2**22
"""Cosines kept of one row for the percentile; of more, every second, third, fourth and so on is kept."""


@dataclass
class _Measured:
    """One row's figures as they come in."""

    images: list[ImageFidelity] = field(default_factory=list)
    cosines: list[Tensor] = field(default_factory=list)

    def add(self, name: str, prediction: Tensor, target: Tensor, basis: Basis) -> None:
        """Take in one image's map (D, H, W); basis: `fidelity_basis` of its target."""
        values = fidelity(prediction, target, basis)
        cosine = F.cosine_similarity(prediction.float(), target.float(), dim=0).flatten().cpu()
        low = torch.quantile(cosine, COSINE_PERCENTILE).item()
        self.images.append(ImageFidelity(name, cosine_p5=low, **values))
        self.cosines.append(cosine)

    def result(self, bilinear: _Measured) -> Fidelity:
        """Over all images, beside the bilinear map's."""
        means = self.means()
        cosines = torch.cat(self.cosines)
        cosines = cosines[:: len(cosines) // MOST_LOCATIONS + 1]
        gaps = {name: gap_over_images(bilinear.values(name), self.values(name), name) for name in FIDELITY}
        names = [image.name for image in self.images]
        domains = gaps_by_domain(names, bilinear.values("cosine"), self.values("cosine"))
        return Fidelity(
            l1=means["l1"],
            cosine=means["cosine"],
            cosine_p5=torch.quantile(cosines, COSINE_PERCENTILE).item(),
            cosine_worst=min(image.cosine for image in self.images),
            edge=means["edge"],
            spectral=means["spectral"],
            recovered_gap={name: known(gap.value) for name, gap in gaps.items()},
            images=tuple(self.images),
            gap_spread={name: known(gap.spread) for name, gap in gaps.items()},
            domains={name: (known(gap.value), known(gap.spread)) for name, gap in domains.items()},
        )

    def means(self) -> dict[str, float]:
        """Over images, by metric."""
        return {name: sum(self.values(name)) / len(self.images) for name in FIDELITY}

    def values(self, metric: str) -> list[float]:
        """Of each image."""
        return [getattr(image, metric) for image in self.images]


@torch.inference_mode()
def measure_fidelity(
    methods: Sequence[Method], views: Views, backbone: Backbone, reporter: Reporter, title: str
) -> dict[str, Fidelity]:
    """Compare every row whose map has the teacher's grid with the teacher's map of the same images.

    Args:
        methods: rows that are compared with one teacher; the first of kind `bilinear` is where recovered gaps begin.
        views: teacher views, one for each image; damaged images are left out, with a warning.
        backbone: the teacher.
        reporter: hears of progress.
        title: of the progress bar.

    Returns:
        By label.

    Raises:
        BrixelError: none of the images can be read.
    """
    bilinear = next(row for row in methods if row.kind == "bilinear")
    compared = [row for row in methods if row.kind != "teacher" and row.grid == bilinear.grid]
    measured = {row.label: _Measured() for row in compared}
    with reporter.bar(title, len(views), unit="image") as bar:
        for number in range(len(views)):
            bar.update(1)
            view = views[0, number]
            if view.skipped:
                reporter.warn(f"left out: {view.skipped[0].name}: {view.skipped[0].reason}")
                continue
            large, target = _image_and_target(view.pixels, backbone)
            basis = fidelity_basis(target)
            for row in compared:
                prediction = row.call(resize_view(large, row.input_size))[0]
                measured[row.label].add(view.name, prediction, target, basis)
    if not measured[bilinear.label].images:
        raise BrixelError(f"None of the {len(views)} images for the fidelity can be read.")
    return {label: row.result(measured[bilinear.label]) for label, row in measured.items()}


@torch.inference_mode()
def draw_examples(
    methods: Sequence[Method],
    views: Views,
    backbone: Backbone,
    ranked: Sequence[ImageFidelity],
    folder: Path,
    model: str,
    size: Size,
) -> list[Picture]:
    """Draw the two worst images, the median and the best: input, every row's map, the teacher's; one file each.

    All of them are also on one page to look at the features with, `Picture.page`.

    Args:
        methods: rows of one model and size.
        views: teacher views, one for each image.
        backbone: the teacher.
        ranked: images, worst first.
        folder: of results.json; the pictures go into its folder `pictures`.
        model: of the rows, for the file names.
        size: of the rows, for the file names.
    """
    numbers = {image.name: number for number, image in enumerate(views.images)}
    shown = [row for row in methods if row.kind not in ("bilinear", "teacher")]
    pictures, seen = [], []
    make_folder(folder / "pictures")
    chosen = sorted({0, min(1, len(ranked) - 1), len(ranked) // 2, len(ranked) - 1})
    for rank, image in ((place + 1, ranked[place]) for place in chosen):
        pixels = views[0, numbers[image.name]].pixels
        large, target = _image_and_target(pixels, backbone)
        maps = [row.call(resize_view(large, row.input_size))[0] for row in shown]
        tiles = [
            denormalise(resize_view(large, size)[0], backbone.mean, backbone.std),
            *pca_colours([*maps, target], reference=target),
        ]
        titles = [f"input {human_size(size)} px", *(row.label for row in shown), "teacher"]
        path = folder / "pictures" / f"{model}_{human_size(size)}_rank{rank}.png"
        save_picture(panel(titles, [tiles]), path)
        named = dict(zip(titles[1:], (map_.cpu() for map_ in [*maps, target]), strict=True))
        seen.append(PageImage(f"{image.name}, number {rank} from the worst", to_pil_image(pixels), named))
        pictures.append(Picture(model, size, image.name, rank, str(path.relative_to(folder))))
    page = feature_page(f"Feature maps of {model} at {human_size(size)} px", seen)
    write_text(folder / pictures[0].page, page.html)
    return pictures


def _image_and_target(pixels: Tensor, backbone: Backbone) -> tuple[Tensor, Tensor]:
    """A teacher view (3, H, W), uint8, normalised as (1, 3, H, W), and the teacher's map (D, h, w) of it."""
    large = normalise_pixels(pixels[None].to(next(backbone.parameters()).device), backbone.mean, backbone.std)
    return large, backbone.last_map(large)[0]
