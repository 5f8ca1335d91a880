"""The models of a benchmark: named by recipes, run folders or a checkpoint, loaded with what weights there are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from brixel_cli.config.base import parse_sizes
from brixel_cli.config.benchmark import BenchmarkOptions
from brixel_cli.config.distill import Recipe, ViewConfig
from brixel_cli.config.files import find_recipe, load_recipe
from brixel_cli.core.backbone import Backbone, check_size
from brixel_cli.core.hub import HUB
from brixel_cli.core.identity import joint_digest, tensors_sha256
from brixel_cli.core.shipped import FILE_NAME, shipped_students
from brixel_cli.core.student import Student
from brixel_cli.data.images import ImageFile, scan_folder, share_out
from brixel_cli.data.views import Views
from brixel_cli.engines.benchmarking.results import Model, Size
from brixel_cli.engines.default_student import default_student
from brixel_cli.engines.distilling.training_images import find_images
from brixel_cli.engines.models import ModelSpec, model_spec
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import BrixelError, UsageError, WeightsError


@dataclass(frozen=True)
class ImageSet:
    """Images for the fidelity, the same at every size."""

    folder: str
    files: list[ImageFile]

    def views(self, backbone: Backbone, factor: int, size: Size) -> Views:
        """Their centre crops for the teacher, of which the student sees `size` (height, width)."""
        fields = {"teacher_size": [factor * side for side in size], "factor": factor}
        config = ViewConfig.model_validate(fields)
        return Views(self.files, config, 0)


@dataclass(frozen=True)
class Candidate:
    """A model of a benchmark.

    Attributes:
        name: what rows call it.
        spec: the student, before its weights are loaded.
        recipe: of the run or the recipe itself; None where a checkpoint comes without.
    """

    name: str
    spec: ModelSpec
    recipe: Recipe | None

    @property
    def trained_size(self) -> Size | None:
        """Student input (height, width) of the training or of the recipe; None: not known."""
        return self.spec.trained_size or (self.recipe.student_hw if self.recipe else None)

    @property
    def random(self) -> bool:
        """Whether the weights are random, so that only cost can be measured."""
        return self.spec.weights == "random"

    def randomised(self) -> Candidate:
        """The same model with random weights."""
        return replace(self, spec=replace(self.spec, weights="random", stored=None, chosen_by=None))

    def describe(self, images: ImageSet | None) -> Model:
        """For the results; files are read for their SHA-256, so that changed ones are told from those measured."""
        spec = self.spec
        return Model(
            name=self.name,
            backbone=spec.backbone,
            weights=spec.weights,
            student=str(spec.stored.path) if spec.stored else None,
            student_sha256=tensors_sha256(spec.stored.tensors) if spec.stored else "",
            adapter=spec.adapter.kind if spec.adapter else "",
            dtype=spec.dtype,
            embed_dim=spec.embed_dim,
            patch_size=spec.patch_size,
            factor=spec.factor,
            trained_size=self.trained_size,
            images=images.folder if images else None,
            num_images=len(images.files) if images else 0,
            weights_sha256=joint_digest([("", Path(spec.weights))]) if Path(spec.weights).is_file() else "",
            images_sha256=joint_digest((file.name, file.path) for file in images.files) if images else "",
        )


def find_candidates(options: BenchmarkOptions, reporter: Reporter) -> list[Candidate]:
    """The models that the options name; without any, the student that comes with brixel.

    Args:
        options: of the benchmark.
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
            raise UsageError(f"--models names no recipe and no student: {options.models!r}.")
    else:
        sizes = parse_sizes(options.sizes, 1) if options.sizes else []
        names = [default_student(None, reporter, min(sizes[0]) if len(sizes) == 1 else None)]
    found = [
        _of_checkpoint(name, options) if options.checkpoint or _is_student(name) else _of_recipe(name, options)
        for name in names
    ]
    for number, candidate in enumerate(found):
        if candidate.name in {other.name for other in found[:number]}:
            raise UsageError(f"--models: two models are called {candidate.name}; rows could not be told apart.")
    return found


def _is_student(name: str) -> bool:
    is_file = Path(name).suffix in (".safetensors", ".pth")
    return is_file or name in shipped_students() or name.startswith(HUB) or (Path(name) / FILE_NAME).is_file()


def _of_recipe(name: str, options: BenchmarkOptions) -> Candidate:
    recipe = load_recipe(str(find_recipe(name)))
    spec = model_spec(
        "student",
        backbone=recipe.backbone.name,
        # For cost alone the numbers in the weights do not matter; for fidelity they are all that matters.
        weights=options.backbone_weights or (recipe.backbone.weights if options.images else "random"),
        dtype=recipe.backbone.dtype,
        adapter=recipe.adapter,
        factor=recipe.views.factor,
    )
    return Candidate(recipe.name, spec, recipe)


def _of_checkpoint(reference: str, options: BenchmarkOptions) -> Candidate:
    spec = model_spec("student", checkpoint=reference, weights=options.backbone_weights)
    assert spec.stored is not None
    path = spec.stored.path
    file = path.parent / "recipe.yaml"
    recipe = load_recipe(str(file)) if file.is_file() else None
    dtype = recipe.backbone.dtype if recipe else "float32"
    name = path.parent.resolve().name if path.name == FILE_NAME else path.stem
    if reference.startswith(HUB):  # the file lies in a folder of the hub's client, which says nothing
        name = reference.rpartition("/")[2]
    candidate = Candidate(name, replace(spec, dtype=dtype), recipe)
    return candidate.randomised() if candidate.random else candidate


def load_or_randomise(
    candidate: Candidate, options: BenchmarkOptions, device: str, reporter: Reporter
) -> tuple[Candidate, Student]:
    """Load a model; where its backbone's weights cannot be had, take random ones, and say that only cost is measured.

    Raises:
        WeightsError: the weights that --backbone-weights names do not do.
    """
    try:
        return candidate, candidate.spec.load_student(device)
    except WeightsError as error:
        if options.backbone_weights:
            raise
        reporter.warn(
            f"{candidate.name}: cost only, with random weights. {str(error).splitlines()[0]} "
            "Give --backbone-weights PATH (.safetensors or .pth) for the fidelity."
        )
        return candidate.randomised(), candidate.randomised().spec.load_student(device)


def sizes_of(candidate: Candidate, options: BenchmarkOptions) -> list[Size]:
    """The student inputs of a model (height, width) in pixels; without --res, that of its training."""
    patch = candidate.spec.patch_size
    own = [candidate.trained_size or (16 * patch, 16 * patch)]
    sizes = parse_sizes(options.sizes, patch) if options.sizes else own
    for size in sizes:
        check_size(*size, patch)
    return sizes


def find_images_of(candidate: Candidate, options: BenchmarkOptions, reporter: Reporter) -> ImageSet | None:
    """The images of --images, or the held-out ones of the candidate's run; None where fidelity makes no sense.

    Raises:
        BrixelError: --images names a folder without images.
    """
    if candidate.random:
        return None
    if options.images is not None:
        return ImageSet(str(options.images), share_out(scan_folder(options.images, 1)[0], options.max_images))
    if candidate.spec.stored is None:
        return None
    if candidate.recipe is None:
        reporter.warn(f"{candidate.name}: no fidelity without images. Give some: --images DIR.")
        return None
    data = candidate.recipe.data
    try:
        held_out = find_images(candidate.recipe).held_out
    except BrixelError as error:
        reporter.warn(f"{candidate.name}: no fidelity. {str(error).splitlines()[0]}")
        return None
    folders = ", ".join(data.held_out_folders.values()) or data.images
    return ImageSet(folders, share_out(held_out, options.max_images))
