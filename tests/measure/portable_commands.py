"""The commands that made result files, as they would stand anywhere: without paths of the machine they ran on."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import load_recipe, shipped_recipes
from brixel_cli.config.labelled import ProbeRecipe
from brixel_cli.config.protocols import published
from brixel_cli.config.section import differences
from brixel_cli.core.shipped import shipped_students
from brixel_cli.engines.probing.results import ModelDescription, ProbeResults

PLACES = {
    "--images": "photos", "data.images": "photos", "data.val_images": "held_out", "--checkpoint": "RUN", "init": "RUN",
    "--probe-data": "data/SET",
}  # fmt: skip
"""What stands for a path, behind these options and settings."""
OWN = ("--output", "--report", "--backbone-weights", "backbone.weights", "cache.directory", "data.root")
"""Options and settings that say no more than where something lies."""
_DIRECTORY = re.compile(r"(?<![\w.])(?:~|\.\.?)?/(?:[^\s,=:/]+/)*(?=[^\s,=:/])")


def without_directories(text: str) -> str:
    """A text in which nothing but the name is left of every path that is not below the working folder."""
    return _DIRECTORY.sub("", text)


def portable(command: str) -> str:
    """A command line of brixel."""
    words, kept = iter(shlex.split(command)), list[str]()
    for word in words:
        if word in OWN:
            next(words)
        elif word == "--set":
            kept += _setting(*next(words).split("=", 1))
        else:
            kept += [word, _place(word, next(words))] if word in PLACES else [without_directories(word)]
    return shlex.join(kept)


def groups_of(command: str) -> list[str]:
    """The groups of variants that an ablation's command names."""
    words = shlex.split(command)
    return [re.sub(r"\.ya?ml$", "", Path(name).name) for name in words[words.index("--ablate") + 1].split(",")]


def distill_command(recipe: Recipe) -> str:
    """The command of a run, with what it changed in the shipped recipe of its name."""
    shipped = recipe.name in shipped_recipes()
    words = [
        "brixel",
        "distill",
        "--recipe",
        f"{'recipes/' if shipped else ''}{recipe.name}.yaml",
        "--images",
        "photos",
    ]
    for key, (_, value) in differences(load_recipe(recipe.name) if shipped else recipe, recipe).items():
        words += _setting(key, value) if key != "data.images" and not key.startswith("run.") else []
    return shlex.join(words)


def probe_command(results: ProbeResults) -> str:
    """The command of a probe, from its results.json; with what it changed in the shipped recipe, and in the protocol."""
    settings, sources = results.settings, results.sources
    name, size, kinds = settings.recipe, settings.size, [source.kind for source in sources.values()]
    protocol = settings.protocol_settings
    shipped = load_recipe(name, [], ProbeRecipe) if name in shipped_recipes(ProbeRecipe) else None
    words = ["brixel", "probe", "--recipe", name if shipped else f"{name}.yaml"]
    words += ["--data", shipped.data.root if shipped else f"data/{name}"]
    words += ["--protocol", protocol.name] if shipped is None or shipped.protocol != protocol.name else []
    if shipped:
        words += ["--size", side(size)] if shipped.size != size else []
        for key, (_, value) in differences(shipped, results.recipe).items():
            words += _setting(key, value) if key not in ("data.download", "protocol", "size") else []
    for key, (_, value) in differences(published(protocol.name, name), protocol).items():
        words += _setting(f"protocol.{key}", value)
    for label, source in sources.items():
        if tuple(kinds) != ("backbone", "equal_cost", "student", "teacher"):
            kind = source.kind.replace("_", "-")
            words += ["--source", label.removeprefix("file ") if source.kind == "file" else kind]
        if isinstance(source, ModelDescription) and source.checkpoint:
            student = Path(source.checkpoint).stem
            words += ["--checkpoint", student if student in shipped_students() else "RUN"]
    plain = sources.get("backbone")
    if "student" not in kinds and isinstance(plain, ModelDescription):
        words += ["--backbone", plain.backbone]
    return shlex.join([*words, *(["--seeds", str(len(results.seeds))] if len(results.seeds) != 3 else [])])


def side(size: int | Sequence[int]) -> str:
    """A size as `--size` takes it: 112, or 112x154 for height and width."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def _setting(key: str, value: object) -> list[str]:
    text = value if isinstance(value, str) else json.dumps(value)
    return [] if key in OWN else ["--set", f"{key}={_place(key, text)}"]


def _place(name: str, value: str) -> str:
    name = "data.val_images" if name.startswith("data.held_out.") else name
    return PLACES[name] if name in PLACES and "/" in value else without_directories(value)
