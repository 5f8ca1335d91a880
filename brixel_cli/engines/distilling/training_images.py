"""The images of a run: found, divided into training and held-out ones, known by their contents, made into views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from brixel_cli.config.distill import Recipe, ViewConfig
from brixel_cli.core.backbone import check_size
from brixel_cli.core.identity import files_sha256, json_digest
from brixel_cli.data.images import ImageFile, Skipped, scan_folder, share_out
from brixel_cli.data.views import Views, hold_out
from brixel_cli.errors import BrixelError, SizeError, UsageError


@dataclass(frozen=True)
class TrainingImages:
    """The images of a run, wherever they are.

    Attributes:
        training: what is trained on.
        held_out: what is measured on, and never trained on.
        skipped: files that cannot be used.
    """

    training: list[ImageFile]
    held_out: list[ImageFile]
    skipped: list[Skipped]

    @property
    def counted(self) -> str:
        """How many there are, for people."""
        return f"{len(self.training)} training and {len(self.held_out)} held-out"

    @property
    def names_and_sizes(self) -> str:
        """How many there are, and a short digest of their names and sizes; runs of old know their images by this."""
        facts = [[(image.name, image.height, image.width) for image in part] for part in (self.training, self.held_out)]
        return f"{self.counted} ({json_digest(facts)[:12]})"

    def sha256(self, progress: Callable[[int], object] = lambda _: None) -> str:
        """Digest of the contents of all images, in their order: the same training and held-out images, the same text.

        Args:
            progress: called with 1 after each image.

        Raises:
            BrixelError: one of them cannot be read.
        """
        contents = files_sha256([image.path for image in (*self.training, *self.held_out)], progress)
        return json_digest([contents[: len(self.training)], contents[len(self.training) :]])


def find_images(recipe: Recipe) -> TrainingImages:
    """Find the recipe's images and hold some out.

    Raises:
        BrixelError: a folder is missing, or holds too few usable images.
    """
    data = recipe.data
    min_side = data.min_side or min(recipe.views.teacher_hw)
    found, skipped = scan_folder(Path(data.images), min_side)
    folders = data.held_out_folders
    if not folders:
        training, held_out = hold_out(found, data.val_fraction, data.max_val_images)
        return TrainingImages(training, held_out, skipped)
    held_out = []
    for domain, folder in folders.items():
        some, more = scan_folder(Path(folder), min_side)
        held_out += [replace(image, name=f"{domain}/{image.name}") if domain else image for image in some]
        skipped = skipped + more
    withheld = {image.path.resolve() for image in held_out}
    training = [image for image in found if image.path.resolve() not in withheld]
    if not training:
        key = "data.held_out" if data.held_out else "data.val_images"
        raise BrixelError(
            f"All images in data.images ({data.images}) are held out by {key} ({', '.join(folders.values())}): "
            "name different folders."
        )
    most = data.max_val_images
    return TrainingImages(training, share_out(held_out, most) if data.held_out else held_out[:most], skipped)


def make_views(recipe: Recipe, images: TrainingImages) -> tuple[Views, Views]:
    """Training views as the recipe says, and held-out ones: the centre crop of each image.

    Raises:
        UsageError: there are fewer training views than sizes.
    """
    centre = ViewConfig(teacher_size=recipe.views.teacher_size, factor=recipe.views.factor)
    training = Views(images.training, recipe.views, recipe.seed)
    if len(training) < recipe.views.num_sizes:
        raise UsageError(
            f"{len(training)} training views cannot be shared out over the {recipe.views.num_sizes} sizes of "
            "views.teacher_size and views.other_sizes: add images, or name fewer sizes."
        )
    return training, Views(images.held_out, centre, recipe.seed)


def check_view_sizes(recipe: Recipe, patch_size: int) -> None:
    """Raise a UsageError with the nearest teacher size, where a student's view is no multiple of the patch."""
    factor = recipe.views.factor
    for number, (height, width) in enumerate(recipe.views.teacher_sizes):
        try:
            check_size(height // factor, width // factor, patch_size)
        except SizeError as error:
            unit = patch_size * factor
            nearest = [max(round(side / unit), 1) * unit for side in (height, width)]
            raise UsageError(
                f"views.{'other_sizes' if number else 'teacher_size'} {height}x{width} does not fit: "
                f"with factor {factor} and patch size {patch_size} "
                f"each side must be a multiple of {unit}. Nearest: {nearest[0]}x{nearest[1]} (height x width)."
            ) from error
