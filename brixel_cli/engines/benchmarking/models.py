"""The models of a benchmark: named by recipes, run folders or a checkpoint, loaded with what weights there are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from brixel_cli.config.benchmark import BenchmarkOptions
from brixel_cli.config.distill import AdapterConfig, Recipe, ViewConfig
from brixel_cli.config.files import find_recipe, load_recipe
from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.identity import joint_digest, tensors_sha256
from brixel_cli.core.shipped import shipped_students
from brixel_cli.core.student import FILE_NAME, StoredAdapter, Student, build_adapter, load_student, read_adapter
from brixel_cli.data.images import Photograph, scan_folder
from brixel_cli.data.views import Views
from brixel_cli.engines.benchmarking.results import Model
from brixel_cli.engines.distilling.training_images import find_images
from brixel_cli.engines.models import default_student
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import BrixelError, UsageError, WeightsError


@dataclass(frozen=True)
class Candidate:
    """A model before its weights are loaded.

    Attributes:
        name: what rows call it.
        backbone: timm name.
        weights: `random`, `pretrained` or a path.
        dtype: in which the weights are held.
        adapter: its options.
        factor: output grid over token grid.
        trained_size: student input (height, width) of the training or of the recipe; None: not known.
        stored: the trained adapter; None: random weights.
        recipe: of the run or the recipe itself; None where a checkpoint comes without.
    """

    name: str
    backbone: str
    weights: str
    dtype: str
    adapter: AdapterConfig
    factor: int
    trained_size: tuple[int, int] | None
    stored: StoredAdapter | None
    recipe: Recipe | None

    def hollow(self) -> Student:
        """Shapes without memory, on the meta device: to be counted."""
        backbone = load_backbone(self.backbone, "random", self.dtype, device="meta")
        return _held(Student(backbone, build_adapter(backbone.embed_dim, self.factor, self.adapter)), self.dtype)

    def load(self, device: str) -> Student:
        """The model itself, ready for inference.

        Raises:
            WeightsError: weights cannot be had, or do not belong together.
        """
        if self.stored is not None and self.weights != "random":
            return load_student(
                self.stored.path,
                backbone=self.backbone,
                backbone_weights=self.weights,
                device=device,
                dtype=self.dtype,
            )
        torch.manual_seed(0)
        backbone = load_backbone(self.backbone, self.weights, self.dtype, device)
        adapter = build_adapter(backbone.embed_dim, self.factor, self.adapter)
        return _held(Student(backbone, adapter.to(device)), self.dtype)

    def describe(self, backbone: Backbone, photos: Photos | None) -> Model:
        """For the results; files are read for their SHA-256, so that changed ones are told from those measured."""
        trained = self.stored if self.weights != "random" else None
        return Model(
            name=self.name,
            backbone=self.backbone,
            weights=self.weights,
            student=str(trained.path) if trained else None,
            student_sha256=tensors_sha256(trained.tensors) if trained else "",
            adapter=self.adapter.kind,
            dtype=self.dtype,
            embed_dim=backbone.embed_dim,
            patch_size=backbone.patch_size,
            factor=self.factor,
            trained_size=self.trained_size,
            images=photos.folder if photos else None,
            num_images=len(photos.photographs) if photos else 0,
            weights_sha256=joint_digest([("", Path(self.weights))]) if Path(self.weights).is_file() else "",
            images_sha256=joint_digest((photo.name, photo.path) for photo in photos.photographs) if photos else "",
        )


def _held(student: Student, dtype: str) -> Student:
    if dtype == "bfloat16":
        student.adapter.to(torch.bfloat16)
    return student.eval().requires_grad_(False)


def find_candidates(options: BenchmarkOptions, precision: str, reporter: Reporter) -> list[Candidate]:
    """The models that the options name; without any, the student that comes with brixel.

    Args:
        options: of the benchmark.
        precision: `bfloat16` holds all weights in it; `float32` leaves them as the recipe has them.
        reporter: hears which model was chosen.

    Raises:
        UsageError: a name is neither a recipe nor a run, or two are called the same.
        WeightsError: a checkpoint cannot be read.
    """
    if options.checkpoint:
        names = [options.checkpoint]
    elif options.models:
        names = [name.strip() for name in options.models.split(",") if name.strip()]
        if not names:
            raise UsageError(f"--models names no recipe and no run folder: {options.models!r}.")
    else:
        names = [default_student(None, reporter)]
    found = [
        _of_checkpoint(name, options, precision)
        if options.checkpoint or name in shipped_students() or (Path(name) / FILE_NAME).is_file()
        else _of_recipe(name, options, precision)
        for name in names
    ]
    for number, candidate in enumerate(found):
        if candidate.name in {other.name for other in found[:number]}:
            raise UsageError(f"--models: two models are called {candidate.name}; rows could not be told apart.")
    return found


def _of_recipe(name: str, options: BenchmarkOptions, precision: str) -> Candidate:
    recipe = load_recipe(str(find_recipe(name)))
    # For cost alone the numbers in the weights do not matter; for fidelity they are all that matters.
    weights = options.backbone_weights or (recipe.backbone.weights if options.images else "random")
    dtype = "bfloat16" if precision == "bfloat16" else recipe.backbone.dtype
    return Candidate(
        recipe.name, recipe.backbone.name, weights, dtype, recipe.adapter, recipe.views.factor, recipe.student_hw,
        None, recipe,
    )  # fmt: skip


def _of_checkpoint(reference: str, options: BenchmarkOptions, precision: str) -> Candidate:
    stored = read_adapter(reference)
    card = stored.card
    if not card.backbone:
        raise UsageError(f"{stored.path} does not say which backbone it belongs to (D = {card.embed_dim}).")
    file = stored.path.parent / "recipe.yaml"
    recipe = load_recipe(str(file)) if file.is_file() else None
    name = stored.path.parent.resolve().name if stored.path.name == FILE_NAME else stored.path.stem
    return Candidate(
        name,
        card.backbone,
        options.backbone_weights or card.backbone_weights,
        "bfloat16" if precision == "bfloat16" else recipe.backbone.dtype if recipe else "float32",
        card.adapter,
        card.factor,
        (card.student_size[0], card.student_size[1]) if card.student_size else recipe.student_hw if recipe else None,
        stored,
        recipe,
    )


def load_or_randomise(
    candidate: Candidate, options: BenchmarkOptions, device: str, reporter: Reporter
) -> tuple[Candidate, Student]:
    """Load a model; where its backbone's weights cannot be had, take random ones, and say that only cost is measured.

    Raises:
        WeightsError: the weights that --backbone-weights names do not do.
    """
    try:
        return candidate, candidate.load(device)
    except WeightsError as error:
        if options.backbone_weights:
            raise
        reporter.warn(
            f"{candidate.name}: cost only, with random weights. {str(error).splitlines()[0]} "
            "Give --backbone-weights PATH (.safetensors or .pth) for the fidelity."
        )
        costed = replace(candidate, weights="random", stored=None)
        return costed, costed.load(device)


@dataclass(frozen=True)
class Photos:
    """Photographs for the fidelity, the same at every size."""

    folder: str
    photographs: list[Photograph]

    def views(self, backbone: Backbone, factor: int, size: tuple[int, int]) -> Views:
        """Their centre crops for the teacher, of which the student sees `size` (height, width)."""
        fields = {"teacher_size": [factor * side for side in size], "factor": factor}
        config = ViewConfig.model_validate(fields)
        return Views(self.photographs, config, 0)


def find_photos(candidate: Candidate, options: BenchmarkOptions, reporter: Reporter) -> Photos | None:
    """The photographs of --images, or the held-out ones of the candidate's run; None where fidelity makes no sense.

    Raises:
        BrixelError: --images names a folder without photographs.
    """
    if candidate.weights == "random":
        return None
    if options.images is not None:
        return Photos(str(options.images), scan_folder(options.images, 1)[0][: options.max_images])
    if candidate.stored is None:
        return None
    if candidate.recipe is None:
        reporter.warn(f"{candidate.name}: no fidelity without photographs. Give some: --images DIR.")
        return None
    data = candidate.recipe.data
    try:
        held_out = find_images(candidate.recipe).held_out
    except BrixelError as error:
        reporter.warn(f"{candidate.name}: no fidelity. {str(error).splitlines()[0]}")
        return None
    return Photos(data.val_images or data.images, held_out[: options.max_images])
