from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, Listener
from safetensors.torch import save_file

import brixel_cli
from brixel_cli import load_student
from brixel_cli.config.distill import AdapterConfig, FusionConfig
from brixel_cli.core.backbone import Backbone, load_backbone
from brixel_cli.core.student import StudentCard, build_adapter, read_adapter, save_student
from brixel_cli.core.weights import load_tensors, save_tensors
from brixel_cli.errors import SizeError, UsageError, WeightsError

SMALL = AdapterConfig(fusion=FusionConfig(width=16, fine_width=16, blocks=[1, 1, 1]))


@pytest.fixture
def backbone_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(load_backbone("test_vit", "random").vit.state_dict(), tmp_path / "backbone.safetensors")
    return tmp_path / "backbone.safetensors"


@pytest.fixture
def student_file(tmp_path: Path, backbone_file: Path) -> Path:
    trunk = load_backbone("test_vit", str(backbone_file))
    card = StudentCard("test_vit", str(backbone_file), trunk.sha256, 64, 4, SMALL, step=7)
    torch.manual_seed(1)
    adapter = build_adapter(64, 4, SMALL)
    torch.nn.init.normal_(adapter.out[1].weight)
    save_student(tmp_path / "mine.safetensors", adapter.state_dict(), card)
    return tmp_path / "mine.safetensors"


def test_two_lines_from_a_file_to_maps(student_file: Path) -> None:
    student = brixel_cli.load_student(student_file)
    maps = student(torch.randn(2, 3, 48, 80))
    assert maps.shape == (2, 64, 12, 20)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert not any(module.training for module in student.modules())


def test_a_released_checkpoint_in_two_lines(backbone_file: Path) -> None:
    released = FIXTURES / "official_layout_tiny.pth"
    student = brixel_cli.load_student(released, backbone="test_vit", backbone_weights=backbone_file, device="cpu")
    assert student(torch.randn(1, 3, 32, 64)).shape == (1, 64, 8, 16)
    assert "skipped that never reach the output" in student.released.summary
    with pytest.raises(UsageError, match=r"does not say which backbone it belongs to \(D = 64\): give --backbone NAME"):
        load_student(released)


def test_the_student_is_backbone_and_adapter(student_file: Path) -> None:
    student = load_student(student_file)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(student(images), student.adapter(images, student.backbone.intermediate_maps(images)))


def test_bfloat16_weights_give_nearly_the_same_maps(student_file: Path) -> None:
    images = torch.randn(1, 3, 48, 48)
    full, half = load_student(student_file)(images), load_student(student_file, dtype="bfloat16")(images)
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(full, half, dim=1).mean() > 0.99


def test_a_size_that_does_not_fit_names_the_nearest(student_file: Path) -> None:
    with pytest.raises(
        SizeError, match=r"50x64 does not fit patch size 16.*Nearest that fit: height 48 or 64, width 64"
    ):
        load_student(student_file)(torch.randn(1, 3, 50, 64))


def test_other_weights_than_in_training_are_refused(student_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    save_file(load_backbone("test_vit", "random").vit.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(
        WeightsError, match=r"are not those that .*mine.safetensors was trained on: SHA-256 .* Give backbone_weights="
    ):
        load_student(student_file, backbone_weights=tmp_path / "other.safetensors")


def test_another_backbone_is_refused(student_file: Path, backbone_file: Path) -> None:
    with pytest.raises(WeightsError, match="was trained on test_vit, not on test_vit3: leave that out, or"):
        load_student(student_file, backbone="test_vit3")
    with pytest.raises(WeightsError, match=r"has width 64, the backbone test_vit3 has 96"):
        load_student(FIXTURES / "official_layout_tiny.pth", backbone="test_vit3", backbone_weights="random")


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        WeightsError,
        match=r"No file or folder at absent.safetensors. A student is a run folder.* that comes with brixel: ",
    ):
        load_student("absent.safetensors")
    (tmp_path / "run").mkdir()
    with pytest.raises(WeightsError, match=r"run holds no student.safetensors: no validation has taken place"):
        load_student("run")


def test_a_student_on_the_hub_is_named_as_in_timm(student_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, name: str, revision: str | None) -> str:
        asked.append((repo, name, revision))
        return str(student_file)

    monkeypatch.setattr("brixel_cli.core.hub.check_hub", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_student("hf-hub:someone/brixel-test").backbone.name == "test_vit"
    load_student("hf-hub:someone/brixel-test@v2")
    assert asked == [("someone/brixel-test", "student.safetensors", revision) for revision in (None, "v2")]

    def refuse(repo: str, name: str, revision: str | None) -> str:
        raise OSError("no route to the hub\nmore")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(WeightsError, match=r"brixel-test could not be downloaded from the hub: no route"):
        load_student("hf-hub:someone/brixel-test")


def test_a_mistyped_path_names_the_nearest_and_never_asks_the_hub(
    student_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "vits").mkdir(parents=True)
    (tmp_path / "runs" / "vitx").mkdir()  # no student in it
    student_file.rename(tmp_path / "runs" / "vits" / "student.safetensors")
    with pytest.raises(WeightsError, match=r"No file or folder at runs/vist. Did you mean runs/vits\?"):
        load_student("runs/vist")
    with pytest.raises(WeightsError, match=r"No file or folder at dinov2_vit14. Did you mean dinov2_vits14\?"):
        load_student("dinov2_vit14")
    with pytest.raises(
        WeightsError, match=r"No file or folder at someone/brixel-test. A student is .*hf-hub:user/name"
    ):
        load_student("someone/brixel-test")


def test_files_that_are_no_students(tmp_path: Path, student_file: Path, backbone_file: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"backbone.safetensors is no brixel student of format brixel-student-1: unmarked"
    ):
        read_adapter(str(backbone_file))
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", {"format": "brixel-student-1", "card": "{}"})
    with pytest.raises(WeightsError, match="its description of the student cannot be read"):
        read_adapter(str(tmp_path / "x.safetensors"))
    stored = read_adapter(str(student_file))
    save_student(tmp_path / "short.safetensors", {"fuse.bias": stored.tensors["fuse.bias"]}, stored.card)
    with pytest.raises(
        WeightsError, match=r"short.safetensors does not fit its own description: \d+ of its keys are wrong"
    ):
        read_adapter(str(tmp_path / "short.safetensors")).build()


def test_a_card_survives_its_file(student_file: Path) -> None:
    card = read_adapter(str(student_file)).card
    assert (card.backbone, card.embed_dim, card.factor, card.step, card.adapter) == ("test_vit", 64, 4, 7, SMALL)


def test_importing_the_package_is_light() -> None:
    assert "load_student" in dir(brixel_cli) or brixel_cli.load_student is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = brixel_cli.nothing


def test_a_real_dinov3_student_of_the_released_kind(tmp_path: Path, listener: Listener) -> None:
    """The whole released path at its real width, with random numbers: D = 384 finds its backbone by itself."""
    torch.manual_seed(0)
    trunk: Backbone = load_backbone("vit_small_patch16_dinov3", "random")
    save_file(trunk.vit.state_dict(), tmp_path / "vits.safetensors")
    adapter = build_adapter(384, 4, AdapterConfig(kind="deformable", residual="half_grid"))
    released = _as_released(adapter.state_dict(), 384)
    torch.save(released, tmp_path / "dinov3_vits16.pth")
    student = load_student(tmp_path / "dinov3_vits16.pth", backbone_weights=tmp_path / "vits.safetensors")
    assert student.backbone.name.startswith("vit_small_patch16_dinov3")
    assert student(torch.randn(1, 3, 64, 96)).shape == (1, 384, 16, 24)
    os.remove(tmp_path / "vits.safetensors")


def _as_released(state: dict[str, torch.Tensor], dim: int) -> dict[str, torch.Tensor]:
    """Our live tensors under the names of the released layout."""
    from brixel_cli.core.weights import _released_name, import_released

    zeros = {_released_name(key): torch.zeros_like(tensor) for key, tensor in state.items()}
    zeros["adapter.level_embed"] = torch.zeros(3, dim)
    assert import_released(zeros).tensors.keys() == state.keys()
    return zeros


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("factor", 0), ("factor", "4"), ("factor", 2**30), ("factor", 4.5), ("factor", True), ("factor", None),
        ("embed_dim", 2**30), ("embed_dim", -1), ("step", "7"), ("student_size", [0, 0]), ("backbone", 3),
        ("adapter", {"fusion": {"width": 2**30}}), ("adapter", {"fusion": {"blocks": [10**9, 0, 0]}}),
        ("adapter", []), ("more", 1),
    ],
)  # fmt: skip
def test_a_card_with_wrong_values_is_refused(student_file: Path, tmp_path: Path, key: str, value: object) -> None:
    tensors, metadata = load_tensors(student_file)
    card = json.loads(metadata["card"]) | {key: value}
    save_tensors(tmp_path / "odd.safetensors", tensors, metadata | {"card": json.dumps(card)})
    with pytest.raises(WeightsError, match=rf"odd.safetensors: its description .* cannot be read: {key}"):
        read_adapter(str(tmp_path / "odd.safetensors"))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 99_999, '{"factor": 4}'])
def test_a_card_that_is_none_is_refused(student_file: Path, tmp_path: Path, text: str) -> None:
    tensors, metadata = load_tensors(student_file)
    save_tensors(tmp_path / "odd.safetensors", tensors, metadata | {"card": text})
    with pytest.raises(WeightsError, match=r"odd.safetensors: its description .* cannot be read: "):
        read_adapter(str(tmp_path / "odd.safetensors"))


def test_a_card_is_compared_with_the_weights_before_memory_is_taken(student_file: Path, tmp_path: Path) -> None:
    tensors, metadata = load_tensors(student_file)
    card = json.loads(metadata["card"])
    card["adapter"]["fusion"] |= {"width": 2**16, "middle_width": 2**16, "fine_width": 2**16}  # 16 GiB and more
    save_tensors(tmp_path / "odd.safetensors", tensors, metadata | {"card": json.dumps(card)})
    with pytest.raises(WeightsError, match="does not fit its own description"):
        read_adapter(str(tmp_path / "odd.safetensors")).build()
