"""Commands as the results page shows them: they make the same again, and name no place of one machine."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from portable_commands import distill_command, groups_of, portable, probe_command
from probe_sets import MACHINE, options_of, probed, segmentation

from brixel_cli.config.files import load_recipe


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("brixel benchmark --images ../shared/p --sizes 96x128", "brixel benchmark --images photos --sizes 96x128"),
        ("brixel benchmark --images photos", "brixel benchmark --images photos"),
        ("brixel benchmark --backbone-weights /w/a.pth --seconds 5", "brixel benchmark --seconds 5"),
        ("brixel benchmark --checkpoint runs/vits --report out", "brixel benchmark --checkpoint RUN"),
        (
            "brixel benchmark --models vits,/a/b/mine --batch-size 2",
            "brixel benchmark --models vits,mine --batch-size 2",
        ),
        ("brixel benchmark --baseline ~/up/x.py:up", "brixel benchmark --baseline x.py:up"),
        ("brixel benchmark --recipe recipes/demo.yaml", "brixel benchmark --recipe recipes/demo.yaml"),
        ("brixel benchmark --set backbone.weights=/w.pth --set seed=1", "brixel benchmark --set seed=1"),
        ("brixel benchmark --set 'a=[1, 2]' --set b=/x/y.pth", "brixel benchmark --set 'a=[1, 2]' --set b=y.pth"),
        ("brixel benchmark --probe camvid --probe-data s/c", "brixel benchmark --probe camvid --probe-data data/SET"),
    ],
)
def test_commands_name_no_place_of_this_machine(command: str, told: str) -> None:
    assert portable(command) == told


def test_the_groups_of_a_command() -> None:
    assert groups_of("brixel benchmark --ablate losses,/a/mine.yaml,b.yml --recipe demo") == ["losses", "mine", "b"]


def test_a_runs_command_makes_its_recipe_again() -> None:
    changes = ["optim.steps=300", "views.other_sizes=[448, [448, 672]]", "views.per_image=3", "loss.l1.form=raw"]
    places = [f"data.images={MACHINE}/p", f"backbone.weights={MACHINE}/w", "run.workers=7"]
    command = distill_command(load_recipe("dinov2_vits", [*changes, *places, f"data.val_images={MACHINE}/v"]))
    assert command.startswith("brixel distill --recipe recipes/dinov2_vits.yaml --images photos --set ")
    words = shlex.split(command)
    overrides = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    assert load_recipe("dinov2_vits", overrides) == load_recipe("dinov2_vits", [*changes, "data.val_images=held_out"])


@pytest.mark.parametrize(
    ("recipe", "overrides", "changes"),
    [
        ("camvid", [], {}),
        ("camvid", ["protocol.steps=null", "protocol.epochs=3", "protocol.batch_norm=false"], {"size": "224"}),
        ("camvid", ["data.evaluate.split=val", "data.list_file=null"], {"protocol": "jafar", "seeds": 5}),
        ("nyuv2_subset_depth", ["protocol.train.scale=[1.0, 1.0]"], {"protocol": "quick", "size": "140x182"}),
    ],
)
def test_a_probes_command_makes_its_options_again(recipe: str, overrides: list[str], changes: dict[str, Any]) -> None:
    options = options_of(recipe, *overrides, **changes)
    figures = {name: segmentation(*[0.5] * options.seeds) for name in ("backbone", "student", "teacher")}
    words = iter(shlex.split(probe_command(probed(options, figures, "students/dinov2_vits14.safetensors")))[2:])
    given: dict[str, list[str]] = {}
    for word in words:
        given.setdefault(word, []).append(next(words))
    assert given.pop("--checkpoint") == ["dinov2_vits14"]  # the shipped student, by its name
    assert given.pop("--source") == list(figures)
    assert given.pop("--data") == [load_recipe(recipe, [], type(options.recipe)).data.root]
    again = options_of(
        given.pop("--recipe")[0],
        *given.pop("--set", []),
        seeds=int(given.pop("--seeds", ["3"])[0]),
        **{name.removeprefix("--"): value for name, (value,) in given.items()},
    )
    assert again == options
