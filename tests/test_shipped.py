"""Students that come with brixel: sound, small, checked, and taken where none was trained."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import Listener
from pack_student import pack
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from brixel_cli.app import app
from brixel_cli.core import shipped
from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.shipped import DEFAULT_STUDENT, STUDENTS, shipped_student, shipped_students
from brixel_cli.core.student import load_student, read_adapter
from brixel_cli.engines.distilling.run_folder import default_student
from brixel_cli.errors import UsageError, WeightsError


@pytest.fixture
def boxed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped students, to be tampered with."""
    folder = tmp_path / "students"
    shutil.copytree(STUDENTS, folder)
    monkeypatch.setattr(shipped, "STUDENTS", folder)
    return folder


@pytest.mark.parametrize("name", shipped_students())
def test_a_shipped_student_is_small_and_whole(name: str) -> None:
    path = shipped_student(name)
    assert path.stat().st_size <= 4_000_000
    with safe_open(path, "pt") as file:
        stored = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert stored == {torch.float16}
    adapter = read_adapter(name).build()
    assert 500_000 <= sum(parameter.numel() for parameter in adapter.parameters()) <= 2_000_000
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in adapter.parameters())
    card = read_adapter(name).card
    assert card.backbone_weights == "pretrained"
    assert len(card.backbone_signature) == card.embed_dim
    assert len(card.student_size) == 2
    assert "/" not in card.backbone
    text = (STUDENTS / f"{name}.md").read_text()
    assert card.backbone in text
    assert all(heading in text for heading in ("## Training data", "## Licence", "## Figures", "## Limits"))


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


def test_the_newest_run_goes_before_the_shipped_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: Listener
) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_student(None, listener) == DEFAULT_STUDENT
    assert default_student("vit_small_patch14_dinov2", listener) == DEFAULT_STUDENT
    assert listener.said == [f"student: {DEFAULT_STUDENT}, which comes with brixel"] * 2
    for name, age in (("old", 200), ("new", 100), ("empty", 0)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "empty":
            student = tmp_path / "runs" / name / "student.safetensors"
            student.touch()
            os.utime(student, (time.time() - age,) * 2)
    assert default_student(None, listener) == "runs/new"
    assert listener.said[-1] == "student: runs/new, the newest under runs"


def test_another_backbone_has_no_shipped_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: Listener
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"No student of test_vit under ./runs, and the one that comes with brixel is"):
        default_student("test_vit", listener)


def test_without_a_hub_the_command_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photographs: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    create = timm.create_model

    def offline(name: str, pretrained: bool = False, **options):
        if pretrained:
            raise OSError("no route to host")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    done = CliRunner().invoke(app, ["extract", "--input", str(photographs), "--device", "cpu"])
    assert done.exit_code == 1
    text = " ".join(done.stderr.split())
    assert "could not be had from the hub: OSError: no route to host" in text
    assert "give the file: --backbone-weights PATH" in text


def test_weights_that_were_converted_or_rounded_will_do(model: tuple[str, str], tmp_path: Path) -> None:
    backbone = load_backbone("test_vit", model[1])
    packed = pack(Path(model[0]), "mine", tmp_path / "box")
    rounded = {key: tensor.bfloat16().float() for key, tensor in backbone.vit.state_dict().items()}
    save_file(rounded, tmp_path / "rounded.safetensors")
    assert load_student(packed, backbone_weights=tmp_path / "rounded.safetensors").backbone.sha256 != backbone.sha256
    other = {key: tensor * 1.5 for key, tensor in rounded.items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="are not those that .* was trained on"):
        load_student(packed, backbone_weights=tmp_path / "other.safetensors")


def test_packing_rounds_to_float16_and_lists_the_sum(
    model: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(Path(model[0]), "mine", tmp_path / "box")
    monkeypatch.setattr(shipped, "STUDENTS", tmp_path / "box")
    shipped_students.cache_clear()
    try:
        assert shipped_student("mine") == path
    finally:
        shipped_students.cache_clear()
    before, after = read_adapter(model[0]), read_adapter(str(path))
    assert after.card.backbone_weights == "pretrained"
    assert all(torch.equal(tensor.half().float(), after.tensors[key]) for key, tensor in before.tensors.items())
