"""A run's student on the Hugging Face hub: weights, card, recipe; in the form that `load_student("hf-hub:...")` reads.

The backbone is never sent. Paths of this machine are left out of what is sent.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import dump_recipe
from brixel_cli.core.formatting import to_json
from brixel_cli.core.hub import HUB
from brixel_cli.core.identity import library_versions
from brixel_cli.core.metric_titles import FIDELITY_TITLES
from brixel_cli.core.shipped import FILE_NAME
from brixel_cli.core.student import StoredAdapter, StudentCard, read_adapter, save_student
from brixel_cli.engines.distilling.validation import HeldOut
from brixel_cli.errors import BrixelError, UsageError

TOKEN = "HF_TOKEN"  # noqa: S105 (the name of a variable)
LICENCES = {"dinov3": "other", "dinov2": "apache-2.0", "siglip": "apache-2.0"}
"""Of backbones, by a part of their name, as the hub calls them."""


def check_target(repository: str, recipe: Recipe) -> None:
    """Look for what would keep a student from being sent, before it is trained.

    Raises:
        UsageError: the name is not user/name, there is no token, or nobody could have the backbone's weights.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise UsageError(f"--push-to-hub takes user/name, not {repository[:80]}.")
    if not os.environ.get(TOKEN):
        raise UsageError(f"--push-to-hub needs a token that may write, in the environment variable {TOKEN}.")
    if recipe.backbone.weights == "random":
        raise UsageError("--push-to-hub: the recipe has backbone.weights=random, which nobody else could have.")


def push_student(run: Path, recipe: Recipe, best: HeldOut, repository: str) -> str:
    """Send the student of a finished run to the hub, as one commit.

    Args:
        run: folder of the run.
        recipe: of the run.
        best: fidelity of the student.
        repository: user/name on the hub; it is made where it is not there.

    Returns:
        The address of the repository.

    Raises:
        BrixelError: the hub refused, or cannot be reached; the run stays as it is.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = files_of(read_adapter(str(run)), recipe, best, repository)
    try:
        api = HfApi(token=os.environ.get(TOKEN))
        address = api.create_repo(repository, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repository, operations, commit_message=f"Student of {recipe.name}, step {best.step}")
    except Exception as error:  # the hub's client raises many kinds: network, rights, absence
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BrixelError(
            f"The student could not be sent to {repository}: {reason} The run is complete; send it with "
            f"brixel distill --resume --output {run} --push-to-hub {repository}"
        ) from error
    return str(address)


def files_of(stored: StoredAdapter, recipe: Recipe, best: HeldOut, repository: str) -> dict[str, bytes]:
    """What is sent, by the names of the files."""
    card = replace(stored.card, backbone_weights="pretrained")
    version = library_versions()["brixel"]
    config = {"library": "brixel", "version": version, **asdict(card), "adapter": card.adapter.model_dump()}
    with tempfile.TemporaryDirectory() as scratch:
        save_student(Path(scratch) / FILE_NAME, stored.tensors, card)
        weights = (Path(scratch) / FILE_NAME).read_bytes()
    return {
        FILE_NAME: weights,
        "config.json": (to_json(config, indent=2) + "\n").encode(),
        "recipe.yaml": dump_recipe(_without_paths(recipe)).encode(),
        "README.md": model_card(card, recipe, best, repository).encode(),
    }


def model_card(card: StudentCard, recipe: Recipe, best: HeldOut, repository: str) -> str:
    """The page of the repository, in the form of the hub's model cards."""
    licence = next((name for part, name in LICENCES.items() if part in card.backbone), "unknown")
    height, width = card.student_size or (112, 112)
    inputs = f"{card.trained_sides[0]} to {card.trained_sides[1]} px" if card.trained_sides else "not known"
    rows = "\n".join(
        f"| {title} | {best.backbone[name]:.3f} | {best.student[name]:.3f} | {_percent(best.recovered_gap, name)} |"
        for name, title in FIDELITY_TITLES.items()
        if name in best.student
    )
    return f"""---
license: {licence}
library_name: brixel
pipeline_tag: image-feature-extraction
base_model: timm/{card.backbone}
tags: [brixel, dense-features, feature-upsampling]
---
# {repository.partition("/")[2]}

A BRIXEL student ([arXiv 2511.05168](https://arxiv.org/abs/2511.05168)) of `{card.backbone}`: from one pass
over a small image it predicts the feature map of the backbone at {card.factor} times the height and width.

```python
import brixel_cli

student = brixel_cli.load_student("{HUB}{repository}")
feature_map = student.features("cat.jpg", res={min(height, width)})  # ({card.embed_dim}, h, w)
```

| | |
|---|---|
| backbone | `{card.backbone}`, not in this repository; SHA-256 of its weights {card.backbone_sha256[:16]}... |
| adapter | `{card.adapter.kind}`, low-rank updates of rank {card.adapter.lora_rank} |
| shorter side of inputs in training | {inputs} |
| updates | {best.step:,}, of {recipe.optim.batch_size} views each |
| training images | the folder `{Path(recipe.data.images).name}`, without labels |
| made with | brixel {library_versions()["brixel"]}; all options are in `recipe.yaml` |

Fidelity to the teacher at an input of {height} x {width} px, mean over {best.num_images} held-out images.
Recovered gap: (student - backbone) / (teacher - backbone).

| metric | backbone | student | recovered gap |
|---|---:|---:|---:|
{rows}

The licence of the backbone may also apply to what is derived from it. Say here which images the student was
trained on, and what it should not be used for.
"""


def _percent(gaps: Mapping[str, float], name: str) -> str:
    value = gaps.get(name)
    return "" if value is None or value != value else f"{value:.0%}"


def _without_paths(recipe: Recipe) -> Recipe:
    """The recipe with names in place of this machine's paths."""
    named = {key: Path(folder).name for key, folder in recipe.data.held_out.items()}
    others = recipe.data.val_images and Path(recipe.data.val_images).name
    data = {"images": Path(recipe.data.images).name, "val_images": others, "held_out": named}
    return recipe.model_copy(
        update={
            "backbone": recipe.backbone.model_copy(update={"weights": "pretrained"}),
            "data": recipe.data.model_copy(update=data),
            "cache": recipe.cache.model_copy(update={"directory": None}),
            "init": recipe.init and Path(recipe.init).name,
        }
    )
