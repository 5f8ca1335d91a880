"""Images whose input is cut into tiles: computed and written without ever holding all of the input or of the map."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from brixel_cli.core.losses import Basis
from brixel_cli.core.sampling import Part, covered_part
from brixel_cli.data import images
from brixel_cli.data.feature_layout import MAP, encode_parts, scale_of
from brixel_cli.data.inputs import reason_of
from brixel_cli.data.resizing import BICUBIC
from brixel_cli.data.row_store import Store
from brixel_cli.engines.extracting.plan import ExtractPlan
from brixel_cli.engines.extracting.tiling import Size, strips
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.errors import BrixelError

MARGIN = 8
"""Pixels around a tile that are resized with it and cut off, so that it is resized as a part of the whole image."""
PIECE_VALUES = 1 << 24
"""Numbers of a strip that are converted and written at a time."""
MAX_TILED_PIXELS = 1 << 30
"""Of an image: it is decoded whole, at 4 bytes a pixel."""


@contextmanager
def larger_images(tiled: bool) -> Iterator[None]:
    """Take images of up to `MAX_TILED_PIXELS` meanwhile, in this process, where they are cut into tiles."""
    before = images.MAX_PIXELS, Image.MAX_IMAGE_PIXELS
    if tiled:
        images.MAX_PIXELS = Image.MAX_IMAGE_PIXELS = MAX_TILED_PIXELS
    try:
        yield
    finally:
        images.MAX_PIXELS, Image.MAX_IMAGE_PIXELS = before


def tile_reader(image: Image.Image, part: Part, size: Size) -> Callable[[int, int, Size], Tensor]:
    """Reads tiles of an image that is resized to `size`, without resizing all of it.

    Args:
        image: upright RGB.
        part: of it that the model sees, in its pixels.
        size: height and width of the model's input.

    Returns:
        From top, left and size of a tile in pixels of the input to its pixels (3, H, W), uint8.
    """
    down, across = part.height / size[0], part.width / size[1]

    def read(top: int, left: int, seen: Size) -> Tensor:
        above, before = min(MARGIN, top), min(MARGIN, left)
        below, after = min(MARGIN, size[0] - top - seen[0]), min(MARGIN, size[1] - left - seen[1])
        box = (
            part.left + (left - before) * across,
            part.top + (top - above) * down,
            min(part.left + (left + seen[1] + after) * across, image.width),
            min(part.top + (top + seen[0] + below) * down, image.height),
        )
        resized = image.resize((seen[1] + before + after, seen[0] + above + below), BICUBIC, box)
        pixels: Tensor = tvf.pil_to_tensor(resized.crop((before, above, before + seen[1], above + seen[0])))
        return pixels

    return read


@contextmanager
def map_strips(plan: ExtractPlan, model: FeatureExtractor, row: int) -> Iterator[Iterator[tuple[int, Tensor]]]:
    """The map of a row whose input is cut into tiles; see `tiling.strips`.

    Raises:
        BrixelError: the image cannot be read; the message starts with the reason.
    """
    size, tiling = plan.model_sizes[row], plan.tiling
    assert size is not None
    assert tiling is not None
    with plan.inputs.decoded(plan.inputs.items[row], size) as image:
        part = covered_part((image.height, image.width), size, plan.options.fit)
        yield strips(model.maps, tile_reader(image, part, size), size, tiling)


def fill_by_tiles(plan: ExtractPlan, model: FeatureExtractor, store: Store, row: int, basis: Basis | None) -> str:
    """Write the map of a row, and mark it as done; returns why it failed, or an empty text.

    Raises:
        BrixelError: memory does not suffice for a tile, or the disk refuses the map.
    """
    places = {part: plan.layout.dataset(part, row) for part in (MAP, scale_of(MAP))}
    with ExitStack() as stack:
        try:
            found = stack.enter_context(map_strips(plan, model, row))
        except BrixelError as error:  # of the image alone: a disk that is full stops the run
            return reason_of(error, plan.inputs.items[row].path)
        for first, piece in _in_pieces(found):
            stored, finite = encode_parts({MAP: piece[None]}, plan.options.dtype, basis)
            if not finite[0]:
                return plan.overflow
            for part, tensor in stored.items():
                name, at = places[part]
                store.put(name, at, tensor[0].numpy(), first)
    store.settle(row, (store.array(name)[at] for name, at in places.values() if name in store))
    return ""


def _in_pieces(strips: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Strips in pieces that are small enough to be converted at once."""
    for first, strip in strips:
        at_once = max(PIECE_VALUES // (strip.shape[0] * strip.shape[2]), 1)
        for start in range(0, strip.shape[1], at_once):
            yield first + start, strip[:, start : start + at_once]
