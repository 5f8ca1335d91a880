"""How an image of any size becomes an input that the model can take: `--res`, `--fit`, and the patch."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from brixel_cli.config.extract import Fit
from brixel_cli.data.images import LARGE_PIXELS
from brixel_cli.data.views import centre_view
from brixel_cli.errors import BrixelError, UsageError

BICUBIC = Image.Resampling.BICUBIC
LEAST_SIDE = 8
LEAST_PATCHES = 2
MOST_ELONGATED = 8


def snap(side: float, patch_size: int) -> int:
    """The multiple of the patch nearest to a side in pixels, at least one patch; halves go up."""
    return max(int(side / patch_size + 0.5), 1) * patch_size


@dataclass(frozen=True)
class Resizing:
    """The resizing of every image; the same for all of them.

    Attributes:
        res: input side in pixels: the shorter one for `short`, both for `centre` and `stretch`.
        fit: `short` keeps the aspect, `centre` crops the middle square, `stretch` squeezes the image into a square.
        patch_size: sides are rounded to multiples of it.
        enlarge: the model's input over `res`: 1, or the teacher's factor.

    Raises:
        UsageError: `res` is under two patches. From there on, rounding changes a side by a fifth at most.
    """

    res: int
    fit: Fit
    patch_size: int
    enlarge: int = 1

    def __post_init__(self) -> None:
        least = LEAST_PATCHES * self.patch_size
        if self.res < least:
            raise UsageError(
                f"--res {self.res} is less than {LEAST_PATCHES} patches of {self.patch_size} pixels: "
                f"give {least} or more."
            )

    def student_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the student's input for an image of this size.

        Raises:
            BrixelError: the image is too small or too elongated to be of use; the message is the reason alone.
        """
        if min(height, width) < LEAST_SIDE:
            raise BrixelError(f"too small: {width}x{height} pixels, shorter side under {LEAST_SIDE}")
        side = snap(self.res, self.patch_size)
        if self.fit != "short":
            return side, side
        if max(height, width) > MOST_ELONGATED * min(height, width):
            raise BrixelError(f"too elongated: {width}x{height} pixels, over {MOST_ELONGATED}:1; --fit centre takes it")
        scale = self.res / min(height, width)
        if height <= width:
            return side, snap(width * scale, self.patch_size)
        return snap(height * scale, self.patch_size), side

    def model_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the input that the model sees; raises as `student_size`."""
        student = self.student_size(height, width)
        return student[0] * self.enlarge, student[1] * self.enlarge

    def snapped(self, height: int, width: int) -> float:
        """By how many pixels the longer change of a side came about through rounding to the patch; 0 for none."""
        chosen = self.student_size(height, width)
        scale = self.res / min(height, width)
        exact = (height * scale, width * scale) if self.fit == "short" else (self.res, self.res)
        return max(abs(a - b) for a, b in zip(chosen, exact, strict=True))

    def apply(self, image: Image.Image, size: tuple[int, int] | None = None) -> Tensor:
        """Pixels (3, height, width), uint8, at the size that the model sees, antialiased bicubic.

        Rounding to the patch changes the aspect by less than half a patch; nothing is cut off but by `centre`.

        Args:
            image: upright.
            size: that the model sees, where the image was decoded at a part of its own; None: `model_size` of it.
        """
        size = size or self.model_size(image.height, image.width)
        if self.fit == "centre" or image.height * image.width > LARGE_PIXELS:  # a tensor of it would be a second copy
            fitted = centre_view(image, size) if self.fit == "centre" else image.resize(size[::-1], BICUBIC)
            view: Tensor = tvf.pil_to_tensor(fitted)
            return view
        # On a tensor it takes a quarter of Pillow's time, and differs by one level of 255 here and there.
        resized: Tensor = tvf.resize(tvf.pil_to_tensor(image), list(size), interpolation=BICUBIC, antialias=True)
        return resized
