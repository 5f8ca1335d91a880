"""Students that come with brixel: sound, small, checked, and taken where none was trained."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import Listener
from pack_student import pack, rounded
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from brixel_cli import load_student
from brixel_cli.app import app
from brixel_cli.config.distill import Recipe
from brixel_cli.config.files import dump_recipe, load_recipe
from brixel_cli.core import shipped
from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.shipped import DEFAULT_STUDENT, STUDENTS, shipped_student, shipped_students
from brixel_cli.core.student import read_adapter, save_student
from brixel_cli.engines.default_student import default_student
from brixel_cli.engines.distilling.run_folder import resolve_paths
from brixel_cli.errors import BrixelError, UsageError, WeightsError


@pytest.fixture
def boxed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the default student, as if it were the only one that is shipped, to be tampered with."""
    (folder := tmp_path / "students").mkdir()
    for file in STUDENTS.glob(f"{DEFAULT_STUDENT}.*"):
        shutil.copy(file, folder)
    (folder / "SHA256SUMS").write_text(f"{shipped_students()[DEFAULT_STUDENT]}  {DEFAULT_STUDENT}.safetensors\n")
    monkeypatch.setattr(shipped, "STUDENTS", folder)
    return folder


@pytest.mark.parametrize("name", shipped_students())
def test_a_shipped_student_is_small_and_whole(name: str) -> None:
    path = shipped_student(name)
    assert path.stat().st_size <= 5_000_000
    with safe_open(path, "pt") as file:
        stored = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert stored == {torch.float16}
    adapter = read_adapter(name).build()
    assert 500_000 <= sum(parameter.numel() for parameter in adapter.parameters()) <= 3_000_000
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in adapter.parameters())
    card = read_adapter(name).card
    assert card.backbone_weights == "pretrained"
    assert len(card.backbone_signature) == card.embed_dim
    assert len(card.student_size) == 2
    least, most = card.trained_sides
    assert least <= min(card.student_size) <= most
    assert str(min(card.student_size)) in card.recovered_gap
    assert card.step > 0
    assert "/" not in card.backbone
    text = (STUDENTS / f"{name}.md").read_text()
    assert card.backbone in text
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert {"Training data", "Licence", "Figures", "Limits"} <= set(sections)
    assert all(len(section.strip()) > 40 for section in sections.values())


def test_the_default_recipe_makes_students_like_the_shipped_one() -> None:
    recipe, card = load_recipe("dinov2_vits"), read_adapter(DEFAULT_STUDENT).card
    assert recipe.adapter == card.adapter
    assert recipe.student_hw == tuple(card.student_size)
    assert recipe.trained_sides == tuple(card.trained_sides)
    tuned = load_recipe("dinov2_vits_tuned")
    assert tuned.init == DEFAULT_STUDENT
    assert (tuned.adapter, tuned.views.factor, tuned.backbone.name) == (card.adapter, card.factor, card.backbone)


def test_a_changed_file_is_refused(boxed: Path) -> None:
    file = boxed / f"{DEFAULT_STUDENT}.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-1] ^= 1
    file.write_bytes(contents)
    with pytest.raises(WeightsError, match=r"is not the file that came with brixel: SHA-256 .*\. Install brixel again"):
        load_student(DEFAULT_STUDENT)
    file.unlink()
    with pytest.raises(WeightsError, match="which comes with brixel, is missing: install brixel again"):
        load_student(DEFAULT_STUDENT)
    (boxed / "SHA256SUMS").unlink()
    with pytest.raises(WeightsError, match="SHA256SUMS, which comes with brixel, is missing: install brixel again"):
        load_student(DEFAULT_STUDENT)


def test_a_folder_of_that_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_STUDENT).mkdir()
    assert read_adapter(DEFAULT_STUDENT).path == STUDENTS / f"{DEFAULT_STUDENT}.safetensors"


def put_run(model: str, name: str, age: int, **changes: object) -> None:
    """A copy of a trained run under ./runs, its card changed, as old as this in seconds."""
    stored = read_adapter(model)
    (file := Path("runs") / name / "student.safetensors").parent.mkdir(parents=True)
    save_student(file, stored.tensors, dataclasses.replace(stored.card, **changes))
    os.utime(file, (time.time() - age,) * 2)


def test_the_shipped_student_is_the_default_and_trained_runs_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: Listener, model: tuple[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_student(None, listener) == DEFAULT_STUDENT
    assert default_student("vit_small_patch14_dinov2", listener) == DEFAULT_STUDENT
    line = f"student: {DEFAULT_STUDENT}, which comes with brixel, trained at {read_adapter(DEFAULT_STUDENT).card.trained_at}"
    assert listener.said == [line] * 2
    put_run(model[0], "old", 200)
    put_run(model[0], "new", 100)
    put_run(model[0], "debug", 0, backbone_weights="random")
    (tmp_path / "runs" / "empty").mkdir()
    for name in ("broken", "dangling"):
        (tmp_path / "runs" / name).mkdir()
    (tmp_path / "runs" / "broken" / "student.safetensors").write_bytes(b"cut short")
    (tmp_path / "runs" / "dangling" / "student.safetensors").symlink_to(tmp_path / "nowhere")
    assert default_student(None, listener) == DEFAULT_STUDENT
    named = "; trained under runs, for --checkpoint: runs/new, runs/old"
    assert listener.said[-1] == line + named
    default_student("vit_small_patch14_dinov2.lvd142m", listener)
    assert listener.said[-1] == line


def ship(folder: Path, name: str, **changes: object) -> None:
    """One more student beside the shipped ones, with another card."""
    stored = read_adapter(DEFAULT_STUDENT)
    run = folder.parent / name
    run.mkdir()
    save_student(run / "student.safetensors", stored.tensors, dataclasses.replace(stored.card, **changes))
    pack(run, name, folder)


@pytest.mark.parametrize(
    ("res", "name"),
    [
        (112, DEFAULT_STUDENT),
        (140, DEFAULT_STUDENT),
        (160, "large"),  # both were trained there; 182 px, where the large one was validated, is nearer than 112 px
        (300, "large"),
        (448, "large"),
        (None, DEFAULT_STUDENT),
    ],
)
def test_the_student_that_was_trained_at_the_size_is_taken(
    res: int | None, name: str, boxed: Path, listener: Listener
) -> None:
    large = {"trained_sides": (150, 448), "student_size": (182, 182), "recovered_gap": {"182": 0.471}, "factor": 2}
    ship(boxed, "large", **large)
    ship(boxed, "other", trained_sides=(28, 2000), student_size=(res or 28,) * 2, backbone="test_vit")
    assert default_student("vit_small_patch14_dinov2", listener, res) == name
    why = "trained at 150 to 448 px (recovered gap on held-out images: 47% at 182 px)" if name == "large" else ""
    assert listener.said[-1].startswith(f"student: {name}, which comes with brixel, {why}")
    assert not listener.warned


def test_a_size_that_no_student_was_trained_at_is_warned_of(boxed: Path, listener: Listener) -> None:
    ship(boxed, "large", trained_sides=(400, 400), student_size=(400, 400), recovered_gap={})
    assert default_student(None, listener, 600) == "large"
    assert listener.warned == [
        "no student that comes with brixel was trained at 600 px. The nearest is large, trained at 400 px: give a "
        "--res within that, or compare its maps with those of --source backbone"
    ]
    assert default_student(None, listener, 56) == DEFAULT_STUDENT
    gap = read_adapter(DEFAULT_STUDENT).card.recovered_gap["112"]
    assert f"(recovered gap on held-out images: {gap:.0%} at 112 px)" in listener.warned[1]


def test_a_run_of_an_earlier_version_has_its_range_from_the_recipe(
    model: tuple[str, str], tmp_path: Path, tiny_recipe: Recipe
) -> None:
    stored = read_adapter(model[0])
    assert not stored.card.trained_sides
    file = tmp_path / "run" / "student.safetensors"
    file.parent.mkdir()
    save_student(file, stored.tensors, stored.card)
    recipe = file.with_name("recipe.yaml")
    recipe.write_text("neither: this\n")
    assert not read_adapter(str(file)).card.trained_sides
    with pytest.raises(BrixelError, match="does not say at which sizes it was trained: give --trained LEAST..MOST"):
        pack(file.parent, "mine", tmp_path / "box")
    views = tiny_recipe.views.model_copy(update={"other_sizes": [[96, 256]]})
    recipe.write_text(dump_recipe(tiny_recipe.model_copy(update={"views": views})))
    assert read_adapter(str(file)).card.trained_sides == (24, 32)


def test_another_backbone_has_no_shipped_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: Listener, model: tuple[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"comes with brixel is of .*, not of test_vit. Name one with --checkpoint, "):
        default_student("test_vit", listener)
    put_run(model[0], "tiny", 0)
    with pytest.raises(UsageError, match=r"Name one with --checkpoint, such as runs/tiny, train one"):
        default_student("test_vit.mine", listener)


def test_runs_load_where_the_list_of_shipped_students_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: tuple[str, str]
) -> None:
    monkeypatch.setattr(shipped, "STUDENTS", tmp_path)
    assert read_adapter(model[0]).card.backbone == "test_vit"
    with pytest.raises(WeightsError, match=r"SHA256SUMS, which comes with brixel, is missing: install brixel again"):
        read_adapter(DEFAULT_STUDENT)


def test_a_shipped_name_stays_one_when_a_run_begins_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (DEFAULT_STUDENT, "mine"):
        (tmp_path / name).mkdir()
    recipe = load_recipe("dinov2_vits")
    inits = [
        resolve_paths(recipe.model_copy(update={"init": name})).init for name in (DEFAULT_STUDENT, "mine", "no/such")
    ]
    assert inits == [DEFAULT_STUDENT, str(tmp_path / "mine"), "no/such"]


def test_a_student_of_random_backbone_weights_is_not_packed(model: tuple[str, str], tmp_path: Path) -> None:
    stored = read_adapter(model[0])
    for changes in ({"backbone_weights": "random"}, {"backbone_signature": ()}):
        save_student(tmp_path / "student.safetensors", stored.tensors, dataclasses.replace(stored.card, **changes))
        with pytest.raises(BrixelError, match=r"nobody could have the backbone's weights that it was trained on"):
            pack(tmp_path, "mine", tmp_path / "packed")


def test_without_a_hub_the_command_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options):
        if pretrained:
            raise OSError("no route to host")
        return create(name, **options)

    monkeypatch.setattr("brixel_cli.core.backbone.check_hub", lambda *_: None)
    monkeypatch.setattr(timm, "create_model", offline)
    done = CliRunner().invoke(app, ["extract", "--input", str(photographs), "--device", "cpu"])
    assert done.exit_code == 1
    text = " ".join(done.stderr.split())
    assert "could not be downloaded from the hub: OSError: no route to host" in text
    assert "give the file, .safetensors or .pth: --backbone-weights PATH" in text


def test_weights_that_were_converted_or_rounded_will_do(model: tuple[str, str], tmp_path: Path) -> None:
    backbone = load_backbone("test_vit", model[1])
    packed = pack(Path(model[0]), "mine", tmp_path / "box", [32, 64])
    rounded = {key: tensor.bfloat16().float() for key, tensor in backbone.vit.state_dict().items()}
    save_file(rounded, tmp_path / "rounded.safetensors")
    assert load_student(packed, backbone_weights=tmp_path / "rounded.safetensors").backbone.sha256 != backbone.sha256
    other = {key: tensor * 1.5 for key, tensor in rounded.items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="are not those that .* was trained on"):
        load_student(packed, backbone_weights=tmp_path / "other.safetensors")


def test_packing_refuses_what_float16_cannot_hold(model: tuple[str, str], tmp_path: Path) -> None:
    stored = read_adapter(model[0])
    save_student(tmp_path / "large.safetensors", {key: t * 1e6 + 1e6 for key, t in stored.tensors.items()}, stored.card)
    with pytest.raises(BrixelError, match=r"large.safetensors: .* is beyond the range of float16"):
        pack(tmp_path / "large.safetensors", "mine", tmp_path / "box", [32, 64])


def test_packing_rounds_and_lists_the_sum(
    model: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(Path(model[0]), "mine", tmp_path / "box", [32, 64])
    monkeypatch.setattr(shipped, "STUDENTS", tmp_path / "box")
    assert shipped_student("mine") == path
    before, after = read_adapter(model[0]), read_adapter(str(path))
    assert after.card.backbone_weights == "pretrained"
    assert list(after.card.trained_sides) == [32, 64]
    for key, tensor in before.tensors.items():
        # Half of the last of seven bits is at most 1/128 of the number; below 2^-14 float16 has steps of 2^-24.
        assert ((after.tensors[key] - tensor).abs() <= tensor.abs() / 128 + 2**-24).all()


def test_weights_are_rounded_to_seven_significant_bits() -> None:
    numbers = torch.tensor([1.0, 129 / 128, 131 / 128, 0.1, -100.4, 0.0])
    # 129/128 is half way between 64/64 and 65/64, 131/128 between 65/64 and 66/64: the even one is taken.
    # 0.1 = 102.4/1024, where steps are 1/1024; at 100.4 they are 1.
    assert rounded(numbers).tolist() == [1.0, 1.0, 66 / 64, 102 / 1024, -100.0, 0.0]
