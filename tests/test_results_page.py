"""The results page: every figure is that of a result file, and nothing in it is of the machine that made it."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import options
from conftest import Listener
from PIL import Image
from probe_sets import MACHINE, options_of, probed, segmentation
from results_page import parse, read_notes, write_page
from results_sections import LARGEST, WIDEST, picture
from test_benchmark_report import fidelity, make_ablations, make_results

from brixel_cli.cli.tables import curve_tables
from brixel_cli.config.distill import Recipe
from brixel_cli.core.metric_titles import gap_text
from brixel_cli.engines.benchmarking.curve import measure_curve
from brixel_cli.engines.distilling.distillation import distill
from brixel_cli.engines.distilling.run_folder import RunFolder
from brixel_cli.engines.probing.folder import ProbeFolder
from brixel_cli.engines.probing.results import ProbeResults
from brixel_cli.errors import BrixelError


def write(folder: Path, *inputs: object, notes: str | None = None) -> str:
    """The page that is made of inputs, as options and their values."""
    (folder / "docs" / "results").mkdir(parents=True, exist_ok=True)
    if notes is not None:
        (folder / "docs" / "results" / "notes.md").write_text(notes)
    files = write_page(parse([*map(str, inputs), "--output", str(folder / "docs" / "RESULTS.md")]))
    assert all(file.is_file() for file in files)
    text = files[0].read_text()
    linked = re.findall(r"!\[[^\]]*\]\((results/[^)]+)\)", text)
    assert sorted(linked) == sorted(f"results/{file.name}" for file in files[1:])
    assert not re.search(r"(?<![\w.])/\w", text)
    return text


def saved(results: Any, folder: Path, name: str = "results.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(results.to_json())
    return folder


def line(text: str, *begin: str) -> list[str]:
    """The cells of the only table row that begins with some cells."""
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|")]
    (found,) = [row for row in rows if tuple(row[: len(begin)]) == begin]
    return found


def headings(text: str) -> list[str]:
    return [row[3:] for row in text.splitlines() if row.startswith("## ")]


# Training


def test_a_runs_own_figures_stand_in_the_page(tiny_recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    best = distill(tiny_recipe, RunFolder(tmp_path / "run"), listener).results.best
    text = write(tmp_path, "--distill", tmp_path / "run")
    assert headings(text) == ["Training"]
    assert "```\nbrixel distill --recipe tiny.yaml --images photos\n```" in text
    for row, kind in (("bilinear backbone", "backbone"), ("student", "student")):
        assert line(text, row)[1:] == [f"{getattr(best, kind)[name]:.4f}" for name in ("l1", "cosine", "edge")]
    assert line(text, "recovered gap")[1:] == [f"{best.recovered_gap[name]:.1%}" for name in ("l1", "cosine", "edge")]
    assert re.fullmatch(r"6 training and 2 held-out \(\w{12}\)", line(text, "images")[1])
    assert line(text, "updates")[1] == f"4 with batches of 4; best validation after {best.step}"
    assert line(text, "input of the student")[1] == "32x32 px"
    speed = re.fullmatch(r"([\d.]+) updates/s, ([\d.]+) images/s", line(text, "speed, median")[1])
    assert speed
    assert float(speed[1]) * 4 == pytest.approx(float(speed[2]), abs=0.1)  # a batch of 4
    curve = (tmp_path / "docs" / "results" / "training.svg").read_text()
    assert len(re.findall(r"<use [^>]*fill: #1769d2", curve)) == 2 + 1  # two validations, and the legend
    assert (tmp_path / "docs" / "results" / "training_maps.jpg").is_file()


def test_photographs_can_stay_out(tiny_recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    distill(tiny_recipe, RunFolder(tmp_path / "run"), listener)
    text = write(tmp_path, "--distill", tmp_path / "run", "--no-photographs")
    assert not list((tmp_path / "docs").rglob("*.jpg"))
    assert "results/training.svg" in text
    assert "results/training_maps.jpg" in write(tmp_path, "--distill", tmp_path / "run")


def test_a_run_that_has_not_ended_is_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").begin(tiny_recipe)
    with pytest.raises(BrixelError, match=r"run/results\.json is missing: give a run that has reached its end"):
        write(tmp_path, "--distill", tmp_path / "run")


def test_the_stages_of_a_training_follow_each_other(tiny_recipe: Recipe, tmp_path: Path, listener: Listener) -> None:
    distill(tiny_recipe, RunFolder(tmp_path / "first"), listener)
    later = tiny_recipe.model_copy(update={"init": str(tmp_path / "first")})
    distill(later, RunFolder(tmp_path / "second"), listener)
    text = write(tmp_path, "--distill", tmp_path / "first", tmp_path / "second")
    assert text.count("| updates |") == 2
    assert text.index("results/training.svg") < text.index("results/training_2.svg")
    assert text.index("results/training_maps.jpg") < text.index("results/training_maps_2.jpg")


def test_domains_have_their_own_table(
    tiny_recipe: Recipe, photographs: Path, tmp_path: Path, listener: Listener
) -> None:
    folders = {name: str(tmp_path / name) for name in ("street", "rooms")}
    for number, folder in enumerate(folders.values()):
        Path(folder).mkdir()
        shutil.copy(photographs / f"{number}.png", folder)
    data = tiny_recipe.data.model_copy(update={"held_out": folders})
    best = distill(tiny_recipe.model_copy(update={"data": data}), RunFolder(tmp_path / "run"), listener).results.best
    text = write(tmp_path, "--distill", tmp_path / "run")
    for domain in ("street", "rooms", "mean"):
        assert line(text, domain)[1] == gap_text(best.domains[domain].value, best.domains[domain].spread)


# Cost, curve, fidelity, sizes


def test_the_curve_is_that_of_the_benchmark(run: Path, photographs: Path, tmp_path: Path, listener: Listener) -> None:
    asked = options(
        tmp_path / "c", highres=False, curve=True, checkpoint=str(run), sizes="32", images=photographs, max_images=2
    )
    curve, _ = measure_curve(asked, listener)
    text = write(tmp_path, "--curves", tmp_path / "c", tmp_path / "c" / "curve.json")
    assert headings(text) == ["Quality against cost"]
    for table in curve_tables(curve):
        for row in table.rows:
            assert text.count(" | ".join(row)) == 2
    assert "results/curve.svg" in text
    assert "results/curve_2.svg" in text


def test_cost_and_fidelity_are_those_of_the_benchmark(tmp_path: Path) -> None:
    command = f"brixel benchmark --compare-highres --checkpoint {MACHINE}/run --images {MACHINE}/p --output {MACHINE}/o"
    results = make_results(tmp_path / "b", sides=(112,))
    model = dataclasses.replace(
        results.models[0], images=f"{MACHINE}/p", weights=f"{MACHINE}/w", student_sha256="ab" * 32
    )
    results = dataclasses.replace(results, command=command, models=(model,))
    text = write(tmp_path, "--benchmark", saved(results, tmp_path / "b"))
    assert headings(text) == ["Cost", "Fidelity"]
    assert text.count("```\nbrixel benchmark --compare-highres --checkpoint RUN --images photos\n```") == 2
    assert "**vits (SHA-256 abababababab) at 112x112 px: " in text
    assert line(text, "student", "112x112")[3:] == ["22.0M", "1.6M", "4.4", "22.0 MiB", "14.4x", "8.2x"]
    assert line(text, "student", "29.0 ms")[-1] == "14.5x"  # 0.42 s over 0.029 s
    # Over the backbone's 2.9 GFLOP, 9 MiB and 21 ms: 4.4 / 2.9, 22 / 9, 29 / 21.
    assert line(text, "student", "1.52x") == ["student", "1.52x", "2.44x", "1.38x"]
    assert "vits: Fidelity to the teacher at 112x112 px: 4 images**" in text
    assert line(text, "student", "0.1200")[2] == "0.8800"
    assert line(text, "student", "20.0%") == ["student", "20.0%", "40.0%", "30.0%", "-"]  # (0.88 - 0.8) / (1 - 0.8)


def test_several_benchmarks_have_their_own_cost_and_those_that_compared_their_fidelity(tmp_path: Path) -> None:
    results = make_results(tmp_path / "b", sides=(112,))
    costs = make_results(tmp_path / "c", sides=(112,), compared=False)
    folders = [
        saved(found, tmp_path / name) for name, found in (("one", results), ("eight", costs), ("other", results))
    ]
    text = write(tmp_path, "--benchmark", *folders)
    assert text.count("Cost relative to the backbone") == 3
    assert text.count("Fidelity to the teacher at 112x112 px") == 2


def test_memory_that_was_obtained_in_another_way_has_no_ratio(tmp_path: Path) -> None:
    results = make_results(tmp_path / "b", sides=(112,), compared=False)
    rows = [dataclasses.replace(row, memory="counted") if row.kind == "student" else row for row in results.rows]
    text = write(tmp_path, "--benchmark", saved(dataclasses.replace(results, rows=tuple(rows)), tmp_path / "b"))
    assert line(text, "student", "1.52x") == ["student", "1.52x", "-", "1.38x"]
    assert headings(text) == ["Cost"]  # nothing was compared


def test_sizes_stand_side_by_side_square_or_not(tmp_path: Path) -> None:
    results = make_results(tmp_path / "s", sides=(112,))
    wide = [
        dataclasses.replace(row, size=(112, 168), fidelity=fidelity(0.85) if row.kind == "student" else row.fidelity)
        for row in results.rows
    ]
    lone = [dataclasses.replace(row, size=(224, 224), fidelity=None) for row in results.rows]
    command = (
        f"brixel benchmark --compare-highres --checkpoint dinov2_vits14 --sizes 112,112x168,224 --images {MACHINE}/p"
    )
    results = dataclasses.replace(
        results,
        command=command,
        rows=(*results.rows, *wide, *lone),
        notes=("Not of a row.", "vits student 224x224: no."),
    )
    text = write(tmp_path, "--sizes", saved(results, tmp_path / "s"))
    assert headings(text) == ["Generalisation over input sizes"]
    assert "--checkpoint dinov2_vits14 --sizes 112,112x168,224 --images photos\n" in text
    expected = ["0.2000", "0.1200", "20.0%", "0.8000", "0.8800", "40.0%", "0.3000", "0.2200", "30.0%"]
    assert line(text, "112x112", "square")[2:] == expected
    assert line(text, "112x168", "not square")[5:8] == ["0.8000", "0.8500", "25.0%"]
    assert set(line(text, "224x224", "square")[2:]) == {"-"}
    assert "- vits student 224x224: no." in text
    assert "Not of a row." not in text


# Probes


def save_probe(folder: Path, results: ProbeResults, quantity: str) -> Path:
    (folder / "pictures").mkdir(parents=True)
    Image.new("RGB", (90, 60), "teal").save(folder / "pictures" / f"{quantity}_median.png")
    ProbeFolder(folder).write(results)
    return folder


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    figures = {
        "backbone": segmentation(0.30, 0.32, 0.34),
        "student": segmentation(0.40, 0.40, 0.40),
        "teacher": segmentation(0.50, 0.52, 0.54),
    }
    return save_probe(tmp_path / "camvid", probed(options_of("camvid"), figures), "segmentation")


def test_probes_are_in_one_table_with_the_mean_recovered_gap(camvid: Path, tmp_path: Path) -> None:
    depth = [[{"rmse_m": value, "delta1": 1 - value / 2}] for value in (1.0, 0.9, 0.5)]
    angles = [[{"mean_angle_deg": value, "within_11.25": 0.5}] for value in (30.0, 20.0, 31.0)]
    names = ("backbone", "student", "teacher")
    nyu = probed(options_of("nyuv2_subset_depth", seeds=1), dict(zip(names, depth, strict=True)))
    normals = probed(options_of("nyuv2_subset_normals", seeds=1), dict(zip(names, angles, strict=True)))
    folders = [camvid, save_probe(tmp_path / "d", nyu, "depth"), save_probe(tmp_path / "n", normals, "normals")]
    text = write(tmp_path, "--probes", *folders)
    assert headings(text) == ["Probes"]
    # (0.40 - 0.32) / (0.52 - 0.32); sample deviation of 0.30, 0.32, 0.34 is 0.02: 0.02 / 0.2 * sqrt(0.6^2 + 0.4^2).
    facts = ["40 +- 7 %", "3", "quick", "112", "1,367 / 233"]
    assert line(text, "camvid", "mIoU (%)")[2:] == ["32.00 +- 2.00", "-", "40.00 +- 0.00", "52.00 +- 2.00", *facts]
    assert line(text, "camvid", "boundary IoU (%)")[2:] == [
        "16.00 +- 1.00",
        "-",
        "20.00 +- 0.00",
        "26.00 +- 1.00",
        *facts,
    ]
    # (0.9 - 1.0) / (0.5 - 1.0); the shipped recipe's protocol fits depth to the truth.
    name = "nyuv2\\_subset\\_depth"
    assert line(text, name, "RMSE, aligned (m)")[2:8] == ["1.0000", "-", "0.9000", "0.5000", "20.0%", "1"]
    assert line(text, name, "delta1 (%)")[2:7] == ["50.00", "-", "55.00", "75.00", "20.0%"]
    # The teacher's angle is worse than the backbone's: no gap.
    assert line(text, "nyuv2\\_subset\\_normals", "mean angle (deg)")[2:7] == ["30.00", "-", "20.00", "31.00", "-"]
    assert "< 11.25 deg" in text.replace("\\", "")
    assert "Mean recovered gap: 30.0%, over camvid mIoU (%), " in text  # of 40 % and 20 %
    assert "a source is missing: nyuv2\\_subset\\_normals mean angle (deg)." in text
    assert text.count("| set |") == 1
    assert text.count("SHA-256 cdcdcdcdcdcd, step 7") == 1
    assert text.count("](results/") == 3
    commands = re.findall(r"```\n(.*?)\n```", text, re.S)
    sources = "--source backbone --source student --checkpoint RUN --source teacher"
    assert commands[0].splitlines()[0] == f"brixel probe --recipe camvid --data data/camvid {sources}"
    assert len(commands[0].splitlines()) == 3


def test_a_set_that_was_probed_twice_has_two_pictures(camvid: Path, tmp_path: Path) -> None:
    text = write(tmp_path, "--probes", camvid, camvid)
    assert "](results/camvid_quick_112.jpg)" in text
    assert "](results/camvid_quick_112_1.jpg)" in text


def test_fine_tuned_students_have_a_section_of_their_own(
    tiny_recipe: Recipe, camvid: Path, tmp_path: Path, listener: Listener
) -> None:
    best = distill(tiny_recipe, RunFolder(tmp_path / "street"), listener).results.best
    text = write(tmp_path, "--tuned-runs", tmp_path / "street", "--tuned-probes", camvid)
    assert headings(text) == ["Fine-tuning"]
    cosines = [f"{getattr(best, kind)['cosine']:.4f}" for kind in ("backbone", "student")]
    assert line(text, "street")[2:] == ["1", "4", *cosines, f"{best.recovered_gap['cosine']:.1%}"]
    assert line(text, "street")[1].startswith("6 training and 2 held-out (")
    assert line(text, "camvid", "mIoU (%)")[6] == "40 +- 7 %"
    assert "brixel distill --recipe tiny.yaml --images photos" in text
    assert "](results/" not in text


def test_sources_that_were_not_probed_are_dashes(tmp_path: Path) -> None:
    results = probed(options_of("camvid", seeds=1), {"backbone": segmentation(0.3)})
    ProbeFolder(tmp_path).write(results)
    text = write(tmp_path, "--probes", tmp_path)
    assert line(text, "camvid", "mIoU (%)")[2:8] == ["30.00", "-", "-", "-", "-", "1"]
    assert "Mean recovered gap" not in text
    assert "--source backbone --backbone vit --seeds 1\n" in text


# Ablations


def test_the_best_cosine_of_each_group_is_bold(tmp_path: Path) -> None:
    made = make_ablations()
    commands = (
        f"brixel benchmark --ablate losses --recipe demo --set data.images={MACHINE}/p --steps 40 --output {MACHINE}/o",
        f"brixel benchmark --ablate adapter,{MACHINE}/mine.yaml --recipe demo --steps 40",
    )
    variants = [
        dataclasses.replace(item, failed=f"{MACHINE}/o keeps its last checkpoint.") if item.failed else item
        for item in made.variants
    ]
    made = dataclasses.replace(made, commands=commands, variants=tuple(variants))
    text = write(tmp_path, "--ablations", saved(made, tmp_path / "a", "ablations.json"))
    assert headings(text) == ["Ablations"]
    assert line(text, "**all**")[1:] == [
        "seed=1",
        "40",
        "0.8600",
        "**0.8600**",
        "0.8600",
        "1.6M",
        "28.7",
    ]  # 0.86 / 30 s
    assert line(text, "l1")[3:6] == ["0.8400", "0.8400", "0.8400"]
    assert line(text, "released")[1:6] == ["seed=1; failed: o keeps its last checkpoint.", "40", "-", "-", "-"]
    assert line(text, "**deformable**")[4] == "**0.8500**"  # better than the bilinear map's 0.8
    assert text.count("**0.") == 2
    twice = write(tmp_path, "--ablations", tmp_path / "a", tmp_path / "a")
    assert (headings(twice), twice.count("**0.")) == (["Ablations"], 4)
    assert (
        "```\nbrixel benchmark --ablate losses --recipe demo --set data.images=photos --steps 40\n```\n\n**losses: "
        in text
    )
    assert "```\nbrixel benchmark --ablate adapter,mine.yaml --recipe demo --steps 40\n```\n\n**adapter: " in text


def test_an_ablation_that_has_not_ended_is_refused(tmp_path: Path) -> None:
    made = make_ablations()
    variants = (dataclasses.replace(made.variants[0], curve=()), *made.variants[1:])
    unfinished = saved(dataclasses.replace(made, variants=variants), tmp_path / "a", "ablations.json")
    told = rf"Not trained yet: {variants[0].group}, {variants[0].name}\. Give an ablation that has reached its end\."
    with pytest.raises(BrixelError, match=told):
        write(tmp_path, "--ablations", unfinished)


# The page


def test_notes_stand_below_the_tables_as_they_are(
    camvid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablated = saved(make_ablations(), tmp_path / "a", "ablations.json")
    notes = "Of the keeper.\n\n## Probes\nWhat *fails*:\n\n- thin <poles>\n\n### More\n\n## Ablations \n\n## Training\nx\n## Cots\ny\n"
    text = write(tmp_path, "--ablations", ablated, "--probes", camvid, notes=notes)
    assert headings(text) == ["Probes", "Ablations"]
    after, _, pictures = text.partition("\n\nWhat *fails*:\n\n- thin <poles>\n\n### More\n\n![camvid")
    assert "boundary IoU" in after
    assert "(results/camvid" in pictures
    assert "Of the keeper." not in text
    assert "no section is called Cots; there are: Training, Cost, " in capsys.readouterr().err
    assert write(tmp_path, "--ablations", ablated, "--probes", camvid) == text  # notes survive
    assert read_notes(tmp_path / "none.md") == {}


def test_pictures_become_small(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (250, 1600, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    (photo,) = picture(tmp_path / "noise.png", "small", "Noise.", tmp_path)
    assert photo.path.stat().st_size <= LARGEST
    with Image.open(photo.path) as image:
        assert image.width <= WIDEST
        assert image.width / image.height == pytest.approx(6.4, abs=0.1)
    assert picture(tmp_path / "none.png", "none", "None.", tmp_path) == []
