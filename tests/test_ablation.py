"""Ablations: which variants there are, that each is trained once, and what is said of them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from printed_json import checked
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.config.benchmark import AblationOptions
from brixel_cli.config.files import load_recipe
from brixel_cli.engines.ablating import ablation
from brixel_cli.engines.ablating import cost as ablation_cost
from brixel_cli.engines.ablating.ablation import ablate
from brixel_cli.engines.ablating.cost import UpdateTimes
from brixel_cli.engines.ablating.results import read_ablations
from brixel_cli.engines.ablating.variants import GROUPS, find_groups
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.distilling.training_images import TrainingImages
from brixel_cli.engines.runtime import Runtime
from brixel_cli.errors import BrixelError, UsageError

CACHED = ["cache.enabled=true", "views.kind=fixed"]
COUNTED: dict[tuple[str, ...], object] = {}
MINE = """
base: {}
l1: {loss.edge.weight: 0.0, loss.cosine.weight: 0, loss.spectral.weight: 0}
small: {adapter.fusion.width: 8, adapter.fusion.blocks: [0, 1, 0]}
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short timings, and each architecture counted once for all tests."""
    monkeypatch.setattr(ablation_cost, "INFERENCE_SECONDS", 0.02)
    for module, name in ((ablation, "count_training"), (ablation_cost, "_gflop")):
        monkeypatch.setattr(module, name, remembered(getattr(module, name)))


def remembered(count):
    def call(recipe, *more):
        key = (count.__name__, recipe.adapter.model_dump_json(), recipe.loss.model_dump_json())
        if key not in COUNTED:
            COUNTED[key] = count(recipe, *more)
        return COUNTED[key]

    return call


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    return path


@pytest.fixture
def run(tiny_recipe_file: Path, mine: Path, tmp_path: Path, listener):
    def call(*overrides: str, groups: tuple[Path, ...] = (mine,), steps: int | None = 4, seconds: float | None = None):
        names = ",".join(str(group) for group in groups)
        steps = None if seconds else steps
        given = (*CACHED, *overrides)
        options = AblationOptions(names, str(tiny_recipe_file), given, steps, seconds, tmp_path / "out")
        return ablate(options, listener)

    return call


def runs_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "ablations").iterdir() if (path / "recipe.yaml").exists())


# Which variants there are


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("recipe", ["demo", "vitl"])
def test_every_built_in_variant_is_a_valid_recipe(group: str, recipe: str) -> None:
    found = [load_recipe(recipe, variant.overrides) for variant in find_groups([group])[group]]
    assert len({one.model_dump_json() for one in found}) >= 2


def test_the_help_names_every_group() -> None:
    shown = " ".join(CliRunner().invoke(app, ["benchmark", "--help"]).output.replace("\u2502", " ").split())
    assert f"separated by commas: {', '.join(GROUPS)}, or your own YAML file" in shown


def test_loss_variants_switch_on_what_their_names_say() -> None:
    base = load_recipe("demo", ["loss.edge.weight=3.0"])
    for variant in find_groups(["losses"])["losses"]:
        loss = load_recipe("demo", ["loss.edge.weight=3.0", *variant.overrides]).loss
        terms = {name for name in ("l1", "edge", "spectral", "cosine") if getattr(loss, name).weight}
        wanted = {"all": "l1+edge+spectral+cosine", "released": "l1+edge+spectral", "recipe": "l1+edge+cosine"}
        assert terms == set(wanted.get(variant.name, variant.name).split("+")), variant.name
        if variant.name not in ("released", "recipe") and loss.edge.weight:
            assert loss.edge.weight == base.loss.edge.weight  # the recipe's own


def test_the_released_losses_are_those_of_the_paper() -> None:
    variant = next(item for item in find_groups(["losses"])["losses"] if item.name == "released")
    loss = load_recipe("demo", variant.overrides).loss
    assert (loss.l1.weight, loss.edge.weight, loss.spectral.weight, loss.cosine.weight) == (1.0, 1.0, 0.1, 0.0)
    assert (loss.l1.form, loss.edge.form, loss.edge.basis, loss.spectral.form) == ("raw", "raw", "batch", "released")


def test_an_unknown_group_is_named_with_the_nearest() -> None:
    with pytest.raises(
        UsageError, match=r"--ablate knows no loses\. Did you mean losses\? It takes losses, spectral, residual, "
    ):
        find_groups(["loses"])
    with pytest.raises(UsageError, match="--ablate names losses twice: give each group once"):
        find_groups(["losses", "losses"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"must hold variants by name, .*'wide: \{adapter\.fusion\.width: 256\}'"),
        ("wide: 3\n", "must hold variants by name"),
        ("- wide\n", "must hold variants by name"),
        ("../up: {seed: 3}\n", r"letters, digits and \. _ \+ -; this one is not: '\.\./up'"),
        ("a: {seed: 3}\na: {seed: 4}\n", "is not a valid YAML file: the key 'a' stands twice"),
    ],
)
def test_faults_of_a_users_file_are_said(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        find_groups([str(path)])
    with pytest.raises(UsageError, match=r"No file of variants at none\.yaml"):
        find_groups(["none.yaml"])


# What an ablation does


def test_runs_of_earlier_versions_call_the_recovered_gap_otherwise(run, mine: Path, tmp_path: Path) -> None:
    base = run().variants[0]
    metrics = tmp_path / "out" / base.folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"recovered_gap"', '"gap_closed"'))
    assert run().variants[0].recovered_gap == base.recovered_gap


def test_variants_are_trained_on_one_cache_and_measured(run, tmp_path: Path, listener) -> None:
    done = run()
    out = tmp_path / "out"
    assert [(item.group, item.name, item.steps, item.failed) for item in done.variants] == [
        ("mine", "base", 4, ""), ("mine", "l1", 4, ""), ("mine", "small", 4, ""),
    ]  # fmt: skip
    assert len(list((out / "ablations" / "cache").glob("*.h5"))) == 1
    assert sum("views need" in line for line in listener.said) == 1  # filled once
    base, l1, small = done.variants
    assert base.num_parameters == l1.num_parameters > small.num_parameters
    assert base.gflop == l1.gflop > small.gflop
    assert base.latency == l1.latency != small.latency  # an architecture is measured once
    assert base.training_bytes > small.training_bytes
    assert base.training_seconds == pytest.approx(4 * base.update_seconds)
    assert [point.step for point in base.curve] == [1, 2, 3, 4]
    assert base.fidelity != l1.fidelity
    assert base.bilinear == l1.bilinear
    # The share that is closed, by its definition: L1 of the teacher is 0.
    closed = (base.fidelity["l1"] - base.bilinear["l1"]) / (0 - base.bilinear["l1"])
    assert base.recovered_gap["l1"] == pytest.approx(closed)
    assert base.num_images == 2
    recipe = load_recipe(str(out / small.folder / "recipe.yaml"))
    assert recipe.adapter.fusion.width == 8
    assert (out / small.folder / "last.safetensors").exists()


def test_the_files_say_what_was_returned(run, tmp_path: Path) -> None:
    done = run()
    assert read_ablations(tmp_path / "out") == done
    lines = list(csv.DictReader((tmp_path / "out" / "ablations.csv").read_text().splitlines()))
    assert [line["variant"] for line in lines] == ["base", "l1", "small"]
    assert float(lines[2]["cosine"]) == done.variants[2].fidelity["cosine"]
    assert lines[2]["changes"] == "adapter.fusion.width=8 adapter.fusion.blocks=[0, 1, 0]"
    (tmp_path / "out" / "ablations.json").write_text("{}")
    with pytest.raises(BrixelError, match="holds no results of this version of brixel benchmark --ablate"):
        read_ablations(tmp_path / "out")
    with pytest.raises(BrixelError, match="No results of brixel benchmark --ablate at .*: No such file"):
        read_ablations(tmp_path / "elsewhere")


def test_what_is_finished_is_not_trained_again_and_what_was_cut_short_goes_on(run, tmp_path: Path, monkeypatch) -> None:
    whole = run()
    out = tmp_path / "out"
    trained: list[tuple[str, bool]] = []
    real = ablation.distill

    def watched(recipe, folder: RunFolder, reporter, resume: bool):
        trained.append((folder.path.name.rpartition("-")[0], resume))
        return real(recipe, folder, reporter, resume=resume)

    monkeypatch.setattr(ablation, "distill", watched)
    assert run().variants[0].curve == whole.variants[0].curve
    assert trained == []
    # As after a kill before the last step was reached.
    (out / whole.variants[1].folder / "results.json").unlink()
    again = run()
    assert trained == [("l1", True)]
    assert again.variants[1].curve == whole.variants[1].curve


def test_other_steps_and_other_photographs_are_other_runs(run, mine: Path, tmp_path: Path) -> None:
    mine.write_text("base: {}\n")
    run(steps=1)
    run(steps=2)
    assert len(runs_of(tmp_path / "out")) == 2
    run("data.val_fraction=0.4", steps=1)
    assert len(runs_of(tmp_path / "out")) == 3


def test_an_image_edited_in_place_makes_other_runs(run, mine: Path, tmp_path: Path, photographs: Path) -> None:
    mine.write_text("base: {}\n")
    folder = tmp_path / "images"
    shutil.copytree(photographs, folder)
    first = run(f"data.images={folder}", steps=1)
    shutil.copyfile(folder / "3.png", folder / "2.png")  # of the same size
    second = run(f"data.images={folder}", steps=1)
    assert len(runs_of(tmp_path / "out")) == 2
    assert first.photographs != second.photographs


def test_a_run_named_by_names_and_sizes_as_of_old_is_found(run, mine: Path, tmp_path: Path, monkeypatch) -> None:
    mine.write_text("base: {}\n")
    with monkeypatch.context() as older:
        older.setattr(TrainingImages, "sha256", lambda self, *_: self.names_and_sizes)
        first = run(steps=1)
    assert run(steps=1).variants[0].folder == first.variants[0].folder


def test_groups_share_the_run_of_equal_variants(run, tmp_path: Path, mine: Path) -> None:
    other = mine.with_name("other.yaml")
    other.write_text("same: {}\nagain: {seed: 0}\nwide: {adapter.fusion.width: 32}\n")
    done = run(groups=(mine, other))
    # `again` equals `same` within its group, and is left out; `same` has the run of `base`.
    assert [item.name for item in done.variants] == ["base", "l1", "small", "same", "wide"]
    assert done.variants[3].folder == done.variants[0].folder
    assert len(runs_of(tmp_path / "out")) == 4
    assert list(done.groups()) == ["mine", "other"]


def test_a_later_group_joins_those_that_are_there_unless_something_else_changed(
    run, mine: Path, tmp_path: Path
) -> None:
    other = mine.with_name("other.yaml")
    for path in (mine, other):
        path.write_text("base: {}\n")
    run()
    done = run(groups=(other,))
    assert list(done.groups()) == ["mine", "other"]
    assert read_ablations(tmp_path / "out") == done
    assert list(run(groups=(other,), steps=2).groups()) == ["other"]
    run()
    assert list(run("optim.lr=2e-3", groups=(other,)).groups()) == ["other"]


def test_equal_time_gives_a_faster_variant_more_steps_and_the_same_when_called_again(
    run, mine: Path, tmp_path: Path
) -> None:
    run()  # measures the updates
    times = tmp_path / "out" / "ablations" / "update_seconds.json"
    stored = json.loads(times.read_text())
    assert len(stored["times"]) == 3
    for number, time in enumerate(stored["times"].values()):
        time["first"] = 0.25 if number == 2 else 0.5
    times.write_text(json.dumps(stored))
    done = run(seconds=2.0)
    assert [item.steps for item in done.variants] == [4, 4, 8]  # 2 s at 0.5, 0.5 and 0.25 s
    # A variant more: all are timed together anew, and those that were there keep their number of updates.
    mine.write_text(MINE + "wide: {adapter.fusion.width: 32}\n")
    more = run(seconds=2.0)
    assert [item.steps for item in more.variants[:3]] == [4, 4, 8]
    stored = json.loads(times.read_text())
    assert {time["session"] for time in stored["times"].values()} == {1}
    assert more.variants[0].update_seconds == stored["times"][next(iter(stored["times"]))]["latest"]
    # Times of another machine do not count.
    times.write_text(json.dumps({**stored, "where": ["abacus"]}))
    run()
    assert {time["session"] for time in json.loads(times.read_text())["times"].values()} == {0}


def test_equal_time_needs_a_cache(tiny_recipe_file: Path, mine: Path, tmp_path: Path, listener) -> None:
    options = AblationOptions(str(mine), str(tiny_recipe_file), train_seconds=1.0, output=tmp_path / "out")
    with pytest.raises(UsageError, match=r"Equal training time is counted in updates from a cache.*cache\.enabled"):
        ablate(options, listener)


def test_a_variant_that_fails_does_not_end_the_others(run, mine: Path, listener, tmp_path: Path) -> None:
    mine.write_text("wild: {optim.lr: 1e30, optim.clip: 0, optim.warmup_steps: 0}\nbase: {}\n")
    wild, base = run(steps=8).variants
    assert "3 updates in a row were refused" in wild.failed
    assert "3 updates in a row were refused" in listener.warned[-1]
    assert wild.fidelity == {}
    assert base.failed == ""
    assert base.fidelity["cosine"] is not None
    assert "3 updates in a row were refused" in (tmp_path / "out" / "ablations.csv").read_text()


def test_faulty_variants_are_refused_before_anything_is_trained(run, mine: Path, tmp_path: Path) -> None:
    mine.write_text("fine: {}\nbad: {adapter.fusion.widht: 3}\n")
    with pytest.raises(
        UsageError, match=r"(?s)Variant bad: .*adapter\.fusion\.widht: unknown key; did you mean width\?"
    ):
        run()
    assert not (tmp_path / "out").exists()


# The command


def test_the_command_lines_of_an_ablation_are_checked() -> None:
    for options, message in (
        ({"groups": " , "}, "--ablate names no group of variants"),
        ({"groups": "losses", "steps": 3, "train_seconds": 3.0}, "--steps and --train-seconds: give one of them"),
        ({"groups": "losses", "steps": 0}, "--steps must be at least 1, not 0"),
        ({"groups": "losses", "train_seconds": 0.0}, "--train-seconds must be above 0, not 0"),
    ):
        with pytest.raises(UsageError, match=message):
            AblationOptions(**options)


def test_the_command_trains_prints_and_reports(tiny_recipe_file: Path, mine: Path, tmp_path: Path) -> None:
    mine.write_text("base: {}\n")
    line = ["benchmark", "--ablate", str(mine), "--recipe", str(tiny_recipe_file), "--output", str(tmp_path / "out")]
    line += ["--set", "cache.enabled=true", "--set", "views.kind=fixed"]
    planned = CliRunner().invoke(app, [*line, "--dry-run"])
    assert planned.exit_code == 0
    assert "base: the recipe as it stands" in planned.stdout
    plan = checked("benchmark-ablate-dry-run", CliRunner().invoke(app, [*line, "--dry-run", "--json"]).stdout)
    assert [variant["name"] for variant in plan["variants"]] == ["base"]
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*line, "--steps", "2", "--report", str(tmp_path / "report"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "recovered gap" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if "│" in line) <= 80
    assert f"wrote {tmp_path / 'report' / 'report.html'}" in done.stdout
    command = read_ablations(tmp_path / "out").commands[0]
    assert command.startswith(f"brixel benchmark --ablate {mine} --recipe {tiny_recipe_file} --set cache.enabled=true")
    assert command.endswith(f"--steps 2 --output {tmp_path / 'out'}")
    assert command in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--steps", "3"], "--steps: only with --ablate."),
        (["--recipe", "demo", "--set", "a=1"], "--recipe and --set: only with --ablate."),
        (
            ["--ablate", "losses", "--sizes", "112"],
            "does without the options of 'brixel benchmark --res 112': see --set",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(line: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["benchmark", *line])
    assert done.exit_code == 2
    assert message in done.output


def test_times_of_another_processor_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, runtime = tmp_path / "update_seconds.json", Runtime("cpu", "float32", training=True)
    times = {"abc": {"first": 0.5, "latest": 0.6, "session": 0}}
    monkeypatch.setattr(ablation_cost, "processor_name", lambda _: "Card A")
    file.write_text(json.dumps({"where": UpdateTimes(file, runtime).where, "times": times}))
    assert UpdateTimes(file, runtime).times["abc"].first == 0.5
    monkeypatch.setattr(ablation_cost, "processor_name", lambda _: "Card B")  # of the same type of device
    assert UpdateTimes(file, runtime).times == {}
