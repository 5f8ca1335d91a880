"""What distilling and planning both need: photographs divided, backbone and adapter built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from brixel_cli.core.adapter import Adapter, build_adapter
from brixel_cli.core.backbone import Backbone, check_size
from brixel_cli.core.student import StoredAdapter, read_adapter
from brixel_cli.data.images import Photograph, Skipped, scan_folder
from brixel_cli.data.views import Views, split_photographs
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import SizeError, UsageError
from brixel_cli.recipe import Recipe, ViewConfig


@dataclass(frozen=True)
class Photographs:
    """The photographs of a run."""

    training: list[Photograph]
    held_out: list[Photograph]
    skipped: list[Skipped]


def find_photographs(recipe: Recipe) -> Photographs:
    """Find the recipe's photographs and hold some out.

    Raises:
        BrixelError: a folder is missing, or holds too few usable photographs.
    """
    data = recipe.data
    min_side = data.min_side or min(recipe.views.teacher_hw)
    found, skipped = scan_folder(Path(data.images).expanduser(), min_side)
    if data.val_images is None:
        training, held_out = split_photographs(found, data.val_fraction, data.max_val_images)
    else:
        training, (held_out, more) = found, scan_folder(Path(data.val_images).expanduser(), min_side)
        held_out, skipped = held_out[: data.max_val_images], skipped + more
    return Photographs(training, held_out, skipped)


def make_views(recipe: Recipe, photographs: Photographs, backbone: Backbone) -> tuple[Views, Views]:
    """Training views as the recipe says, and held-out ones: the centre crop of each photograph."""
    centre = ViewConfig(teacher_size=recipe.views.teacher_size, factor=recipe.views.factor)
    return (
        Views(photographs.training, recipe.views, recipe.seed, backbone.mean, backbone.std),
        Views(photographs.held_out, centre, recipe.seed, backbone.mean, backbone.std),
    )


def check_view_sizes(recipe: Recipe, patch_size: int) -> None:
    """Raise a UsageError with the nearest teacher size, where the student's view is no multiple of the patch."""
    try:
        check_size(*recipe.student_hw, patch_size)
    except SizeError as error:
        unit = patch_size * recipe.views.factor
        nearest = [max(round(side / unit), 1) * unit for side in recipe.views.teacher_hw]
        raise UsageError(
            f"views.teacher_size {recipe.views.teacher_size} does not fit: with factor {recipe.views.factor} and patch "
            f"size {patch_size} each side must be a multiple of {unit}. "
            f"Nearest: {nearest[0]}x{nearest[1]} (height x width)."
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
    stored: StoredAdapter = read_adapter(recipe.init)
    wanted = {
        "embed_dim": backbone.embed_dim,
        "views.factor": recipe.views.factor,
        "adapter.kind": recipe.adapter.kind,
        "adapter.residual": recipe.adapter.residual,
        f"adapter.{recipe.adapter.kind}": getattr(recipe.adapter, recipe.adapter.kind).model_dump(),
    }
    card = stored.card
    found = {
        "embed_dim": card.embed_dim,
        "views.factor": card.factor,
        "adapter.kind": card.adapter.kind,
        "adapter.residual": card.adapter.residual,
        f"adapter.{recipe.adapter.kind}": getattr(card.adapter, recipe.adapter.kind).model_dump(),
    }
    different = [f"{key}: recipe {wanted[key]}, file {found[key]}" for key in wanted if wanted[key] != found[key]]
    if different:
        raise UsageError(f"init: {stored.path} does not fit the recipe:\n  " + "\n  ".join(different))
    if stored.released and reporter:
        reporter.say(f"init: {stored.path}: {stored.released.summary}")
    return stored.build()
