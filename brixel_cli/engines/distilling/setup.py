"""What distilling and planning both need: photographs divided, backbone and adapter built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from brixel_cli.config.distill import AdapterConfig, Recipe, ViewConfig
from brixel_cli.core.adapter import Adapter
from brixel_cli.core.backbone import Backbone, check_size, same_model
from brixel_cli.core.identity import json_digest
from brixel_cli.core.shipped import shipped_students
from brixel_cli.core.student import build_adapter, read_adapter
from brixel_cli.data.images import Photograph, Skipped, scan_folder
from brixel_cli.data.views import Views, split_photographs
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import BrixelError, SizeError, UsageError


@dataclass(frozen=True)
class Photographs:
    """The photographs of a run."""

    training: list[Photograph]
    held_out: list[Photograph]
    skipped: list[Skipped]

    @property
    def fingerprint(self) -> str:
        """How many there are, and a short digest of their names and sizes: the same photographs, the same text."""
        facts = [[(p.name, p.height, p.width) for p in part] for part in (self.training, self.held_out)]
        return f"{len(self.training)} training and {len(self.held_out)} held-out ({json_digest(facts)[:12]})"


def resolve_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, so that the run it is written into can be used from any folder."""

    def absolute(path: str | None) -> str | None:
        return path and str(Path(path).expanduser().absolute())

    weights, init = recipe.backbone.weights, recipe.init
    backbone = {} if weights in ("pretrained", "random") else {"weights": absolute(weights)}
    return recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update=backbone),
            "data": recipe.data.model_copy(
                update={"images": absolute(recipe.data.images), "val_images": absolute(recipe.data.val_images)}
            ),
            "cache": recipe.cache.model_copy(update={"directory": absolute(recipe.cache.directory)}),
            "init": absolute(init)
            if init and init not in shipped_students() and Path(init).expanduser().exists()
            else init,
        }
    )


def find_photographs(recipe: Recipe) -> Photographs:
    """Find the recipe's photographs and hold some out.

    Raises:
        BrixelError: a folder is missing, or holds too few usable photographs.
    """
    data = recipe.data
    min_side = data.min_side or min(recipe.views.teacher_hw)
    found, skipped = scan_folder(Path(data.images), min_side)
    if data.val_images is None:
        training, held_out = split_photographs(found, data.val_fraction, data.max_val_images)
    else:
        held_out, more = scan_folder(Path(data.val_images), min_side)
        withheld = {photograph.path.resolve() for photograph in held_out}
        training = [photograph for photograph in found if photograph.path.resolve() not in withheld]
        if not training:
            raise BrixelError(
                f"All photographs in data.images ({data.images}) are held out by data.val_images ({data.val_images}): "
                "name different folders."
            )
        held_out, skipped = held_out[: data.max_val_images], skipped + more
    return Photographs(training, held_out, skipped)


def make_views(recipe: Recipe, photographs: Photographs, backbone: Backbone) -> tuple[Views, Views]:
    """Training views as the recipe says, and held-out ones: the centre crop of each photograph.

    Raises:
        UsageError: there are fewer training views than sizes.
    """
    centre = ViewConfig(teacher_size=recipe.views.teacher_size, factor=recipe.views.factor)
    training = Views(photographs.training, recipe.views, recipe.seed, backbone.mean, backbone.std)
    if len(training) < recipe.views.num_sizes:
        raise UsageError(
            f"{len(training)} training views cannot be shared out over the {recipe.views.num_sizes} sizes of "
            "views.teacher_size and views.other_sizes: add photographs, or name fewer sizes."
        )
    return training, Views(photographs.held_out, centre, recipe.seed, backbone.mean, backbone.std)


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


def make_adapter(recipe: Recipe, backbone: Backbone, reporter: Reporter | None = None) -> Adapter:
    """A fresh adapter, seeded by the recipe, or the one that `init` names; a reporter hears what was skipped of it.

    Raises:
        WeightsError: `init` cannot be read.
        UsageError: `init` is of another kind, width or factor than the recipe.
    """
    torch.manual_seed(recipe.seed)
    if recipe.init is None:
        return build_adapter(backbone.embed_dim, recipe.views.factor, recipe.adapter)
    stored = read_adapter(recipe.init)
    card = stored.card
    wanted = _architecture(backbone.embed_dim, recipe.views.factor, recipe.adapter)
    found = _architecture(card.embed_dim, card.factor, card.adapter)
    different = [
        f"{key}: recipe {wanted.get(key, '-')}, file {found.get(key, '-')}"
        for key in wanted | found
        if wanted.get(key) != found.get(key)
    ]
    if different:
        raise UsageError(f"init: {stored.path} does not fit the recipe:\n  " + "\n  ".join(different))
    if reporter and stored.released:
        reporter.say(f"init: {stored.path}: {stored.released.summary}")
    if reporter and card.backbone and not same_model(card.backbone, backbone.name):
        reporter.warn(f"init: {stored.path} belongs to {card.backbone}, not to {backbone.name}")
    return stored.build(recipe.adapter)


def _architecture(embed_dim: int, factor: int, config: AdapterConfig) -> dict[str, object]:
    """What two adapters must have in common for one to take the other's weights."""
    options = getattr(config, config.kind).model_dump()
    options.pop("drop_path", None)
    fixed = {"embed_dim": embed_dim, "views.factor": factor, "adapter.kind": config.kind}
    chosen = {f"adapter.{config.kind}.{key}": value for key, value in options.items()}
    return {**fixed, "adapter.residual": config.residual, **chosen}
