"""Views: training crops, which the teacher sees, and the student's reduced ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from brixel_cli.config.distill import ViewConfig
from brixel_cli.core.identity import text_digest
from brixel_cli.core.sampling import covering
from brixel_cli.data.images import ImageFile, Skipped, decoded
from brixel_cli.errors import BrixelError


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several numbers (run seed, step, process ...), the same on every machine."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1


def centre_view(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The released view: resized to cover `size` (height, width) with antialiasing, centre crop."""
    covered = list(covering((image.height, image.width), size))
    resized = tvf.resize(image, covered, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    view: Image.Image = tvf.center_crop(resized, list(size))
    return view


def random_view(
    load: Callable[[tuple[int, int]], Image.Image],
    whole: tuple[int, int],
    size: tuple[int, int],
    config: ViewConfig,
    seed: int,
) -> Image.Image:
    """A random resized crop to `size` (height, width), with the recipe's further changes of place and colour.

    The same seed gives the same view. Teachers label whatever they are shown, and views that differ more teach more:
    Beyer et al., Knowledge distillation: a good teacher is patient and consistent, arXiv 2106.05237.

    Args:
        load: the image, of which a part is taken, at this height and width or more: there the crop has as many pixels
            as the view.
        whole: height and width of the image file.
        size: of the view.
        config: the recipe's `views` section.
        seed: of all that is random.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        top, left, height, width = _random_box(whole, size, config)
        image = load((math.ceil(size[0] * whole[0] / height), math.ceil(size[1] * whole[1] / width)))
        down, across = image.height / whole[0], image.width / whole[1]
        box = left * across, top * down, (left + width) * across, (top + height) * down
        first = math.floor(box[0]), math.floor(box[1])
        last = min(math.ceil(box[2]), image.width), min(math.ceil(box[3]), image.height)
        part = image.crop((*first, *last))
        inside = box[0] - first[0], box[1] - first[1], min(box[2], last[0]) - first[0], min(box[3], last[1]) - first[1]
        view: Image.Image = part.resize(size[::-1], Image.Resampling.BICUBIC, inside)
        if config.flip and torch.rand(()) < 0.5:
            view = tvf.horizontal_flip(view)
        return _changed(view, config)


def _random_box(whole: tuple[int, int], size: tuple[int, int], config: ViewConfig) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop of an image, as torch's generator has it."""
    aspect = size[1] / size[0]
    top, left, height, width = v2.RandomResizedCrop.get_params(
        torch.empty(0, *whole), list(config.scale), [aspect * 3 / 4, aspect * 4 / 3]
    )
    return int(top), int(left), int(height), int(width)


def _changed(view: Image.Image, config: ViewConfig) -> Image.Image:
    """Colour and perspective changed at random, as far as the recipe says."""
    brightness, contrast, saturation, hue = config.jitter
    changes: list[v2.Transform] = []
    if any(config.jitter):
        changes.append(v2.ColorJitter(brightness, contrast, saturation, hue))
    if config.grayscale:
        changes.append(v2.RandomGrayscale(config.grayscale))
    if config.perspective:
        changes.append(v2.RandomPerspective(config.perspective, p=0.5))
    for change in changes:
        view = change(view)
    return view


def normalise_pixels(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """RGB pixels (..., 3, H, W), uint8, as the backbone wants them: float32, in [0, 1], then minus mean over std."""
    normalised: Tensor = tvf.normalize(tvf.to_dtype(pixels, torch.float32, scale=True), list(mean), list(std))
    return normalised


def reduce_view(teacher_views: Tensor, factor: int) -> Tensor:
    """The student's views (B, 3, H / factor, W / factor): antialiased bicubic reduction of the teacher's, float32."""
    return resize_view(teacher_views, (teacher_views.shape[-2] // factor, teacher_views.shape[-1] // factor))


def resize_view(views: Tensor, size: tuple[int, int]) -> Tensor:
    """Views (B, 3, H, W) at a size (height, width) in pixels: antialiased bicubic, float32."""
    with torch.autocast(views.device.type, enabled=False):  # on CPU it has no bfloat16 kernel
        return F.interpolate(views.float(), size=size, mode="bicubic", antialias=True)


@dataclass(frozen=True)
class View:
    """A teacher view that was made: pixels (3, H, W), uint8, the image's name, and files found unreadable."""

    pixels: Tensor
    name: str
    skipped: tuple[Skipped, ...] = ()


class Views(Dataset[View]):
    """The teacher views of a set of images, indexed by (epoch, number of the view).

    An image that turns out to be damaged is replaced by the next one of the list, and reported in the view. A JPEG is
    decoded at a half, a quarter or an eighth of its size where the part that is seen still has as many pixels as the
    view.

    Args:
        images: as found by `scan_folder`.
        config: the recipe's `views` section.
        seed: of the random crops.
    """

    def __init__(self, images: Sequence[ImageFile], config: ViewConfig, seed: int):
        self.images = list(images)
        self.config = config
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images) * self.config.per_image

    def size_number(self, epoch: int, number: int) -> int:
        """Which of the config's sizes a view has; random views of an image change it from epoch to epoch."""
        return (number + (epoch if self.config.kind == "random" else 0)) % self.config.num_sizes

    def image(self, number: int) -> ImageFile:
        """The image that a view is to be cut from."""
        return self.images[number // self.config.per_image]

    def _seed(self, epoch: int, number: int) -> int | None:
        """Of a random view; None for a centre crop."""
        if self.config.kind == "centre" or (self.config.kind == "fixed" and number % self.config.per_image == 0):
            return None
        return seed_of(self.seed, epoch if self.config.kind == "random" else 0, number)

    def _view(self, file: ImageFile, size: tuple[int, int], seed: int | None) -> Image.Image:
        def load(enough: tuple[int, int]) -> Image.Image:
            return stack.enter_context(decoded(file.path, enough=enough))

        whole = file.height, file.width
        with ExitStack() as stack:
            if seed is None:
                return centre_view(load(covering(whole, size)), size)
            return random_view(load, whole, size, self.config, seed)

    def __getitem__(self, key: tuple[int, int]) -> View:
        epoch, number = key
        first = number // self.config.per_image
        skipped: list[Skipped] = []
        for offset in range(len(self.images)):
            file = self.images[(first + offset) % len(self.images)]
            size = self.config.teacher_sizes[self.size_number(epoch, number)]
            try:
                view = self._view(file, size, self._seed(epoch, number))
            except BrixelError as error:
                skipped.append(Skipped(file.name, str(error).removesuffix(f": {file.path}")))
                continue
            return View(tvf.pil_to_tensor(view), file.name, tuple(skipped))
        raise BrixelError(f"None of the {len(self.images)} images can be read; the first: {skipped[0].reason}.")


def hold_out(images: Sequence[ImageFile], fraction: float, most: int) -> tuple[list[ImageFile], list[ImageFile]]:
    """Training and held-out images: about `fraction` is held out, at least one.

    The choice depends on each file's name alone, so that a growing folder keeps its held-out images. No more
    than `most` of them are returned; the others are not trained on either.

    Raises:
        BrixelError: there are fewer than two images.
    """
    if len(images) < 2:
        raise BrixelError(
            "One image cannot be split into training and held-out ones: add more, or give data.val_images."
        )

    def place(image: ImageFile) -> float:
        return int(text_digest(image.name)[:16], 16) / 2**64

    ranked = sorted(images, key=place)
    num_held_out = sum(place(image) < fraction for image in ranked)
    kept_back = ranked[: min(max(num_held_out, 1), len(ranked) - 1)]
    withheld, held_out = set(kept_back), set(kept_back[:most])
    training = [image for image in images if image not in withheld]
    return training, [image for image in images if image in held_out]
