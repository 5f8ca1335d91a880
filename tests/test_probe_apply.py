"""A saved head on new images: the whole way from photographs to masks, depth and normals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Listener, make_photograph
from PIL import Image
from probe_sets import CLASSES, SOURCES, make_options, noise, write_features

from brixel_cli.config.probe import ApplyOptions
from brixel_cli.core.heads import load_head, save_head
from brixel_cli.drawing.predictions import class_colours
from brixel_cli.engines.equal_cost import EQUAL_COST
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.engines.probing import application
from brixel_cli.engines.probing.application import apply_head, depth_unit, encode_prediction
from brixel_cli.engines.probing.folder import file_name
from brixel_cli.engines.probing.probing import plan_only, probe
from brixel_cli.errors import BrixelError, UsageError, WeightsError

FAST = ["protocol.steps=3", "protocol.points=64"]


@pytest.fixture(scope="session")
def probed(root: Path, tmp_path_factory: pytest.TempPathFactory, model) -> Path:
    """Heads of backbone, student and teacher for segmentation, and of the student for depth and normals."""
    folder = tmp_path_factory.mktemp("probed")
    for task, sources in (("segmentation", [*SOURCES, "equal-cost"]), ("depth_normals", ["student"])):
        options = make_options(root, folder / task, task, sources=sources, checkpoints=[model[0]], overrides=FAST)
        probe(options, Listener())
    return folder


def head(probed: Path, task: str = "segmentation", source: str = "student") -> Path:
    label = file_name(EQUAL_COST) if source == "equal-cost" else source
    return probed / task / "heads" / f"{label}_seed0.safetensors"


@pytest.mark.parametrize("source", ["backbone", "equal-cost", "student", "teacher"])
def test_masks_of_the_probed_images_are_those_of_the_probe(
    root: Path, probed: Path, tmp_path: Path, model, listener: Listener, source: str
) -> None:
    from brixel_cli.core.heads import load_head
    from brixel_cli.engines.probing.evaluation import predict
    from brixel_cli.engines.probing.features import open_maps

    done = apply_head(
        ApplyOptions(
            head(probed, source=source), [str(root / "images/val")], tmp_path / "out", device="cpu", precision="float32"
        ),
        listener,
    )
    assert (done.num_images, done.num_written, done.failures) == (4, 4, {})
    options = make_options(root, probed / "segmentation", checkpoints=[model[0]], overrides=FAST, sources=[source])
    item = plan_only(options, listener).sources[0]
    trained, _ = load_head(head(probed, source=source))
    for number, name in enumerate(item.evaluate.labelled.names):
        expected = predict(
            trained, open_maps(item, item.evaluate), item.evaluate, number, (48, 64), device=torch.device("cpu")
        )
        mask = Image.open(tmp_path / "out" / "segmentation" / Path(name).name)
        assert mask.mode == "P"
        # Stored and fresh maps differ in the last bit of float16 at most: at a tie, a pixel may fall either way.
        assert (np.asarray(mask) == expected["segmentation"].numpy()).mean() > 0.999
        preview = Image.open(tmp_path / "out" / "segmentation_preview" / Path(name).name)
        assert (preview.mode, preview.size) == ("RGB", (64, 48))


def test_the_folder_says_what_its_numbers_are(root: Path, probed: Path, tmp_path: Path, listener: Listener) -> None:
    done = apply_head(ApplyOptions(head(probed), [str(root / "images/val")], tmp_path / "out", device="cpu"), listener)
    said = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert said["classes"] == list(CLASSES)
    assert (said["label"], said["recipe"], said["size"]) == ("student", "mine", 32)
    assert said["protocol"] == "quick (changed: points=64, steps=3)"
    assert len(said["head_sha256"]) == 64
    assert done.what == "segmentation by student, trained on mine"
    assert all(path.exists() for path in done.files)


def test_depth_and_normals_keep_names_and_sizes(probed: Path, tmp_path: Path, listener: Listener) -> None:
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    make_photograph(folder / "trip" / "wide.jpg", 1, 130, 70)
    make_photograph(folder / "tall.png", 2, 50, 90)
    done = apply_head(ApplyOptions(head(probed, "depth_normals"), [str(folder)], device="cpu"), listener)
    out = tmp_path / "photos_depth_normals"
    assert done.output == out
    depth = Image.open(out / "depth" / "trip" / "wide.png")
    assert (depth.size, depth.mode) == ((130, 70), "I;16")
    metres = np.asarray(depth) / 1000
    assert metres.min() >= 1
    assert metres.max() <= 4
    normals = np.asarray(Image.open(out / "normals" / "tall.png")) / 127.5 - 1
    assert normals.shape == (90, 50, 3)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=0.02)
    previews = {path.name for kind in ("depth", "normals") for path in (out / f"{kind}_preview").rglob("*.png")}
    assert previews == {"wide.png", "tall.png"}
    assert [note.split(":")[0] for note in done.notes] == ["depth", "normals"]


def test_what_is_stored_is_exact() -> None:
    image = Image.new("RGB", (2, 1))
    mask, _ = encode_prediction("segmentation", image, torch.tensor([[2, 0]]), 1000)
    assert np.asarray(mask).tolist() == [[2, 0]]
    assert np.asarray(mask.convert("RGB"))[0, 0].tolist() == class_colours()[2].tolist()
    for unit, stored in ((1000, [1234, 65535]), (100, [123, 6554])):  # 65.535 m is the last millimetre of 16 bits
        depth, _ = encode_prediction("depth", image, torch.tensor([[1.2344, 65.535]]), unit)
        assert np.asarray(depth).tolist() == [stored]
    normals, _ = encode_prediction("normals", image, torch.tensor([[[1.0, 0]], [[0.0, -1]], [[0.0, 0]]]), 1000)
    assert np.asarray(normals).tolist() == [[[255, 128, 128], [128, 0, 128]]]


def test_the_unit_of_depth_is_the_finest_that_holds_the_depths_of_the_training() -> None:
    assert [depth_unit(deepest) for deepest in (10.0, 65.535, 65.6, 80.0, 655.35, 700.0, 70_000.0)] == [
        1000, 1000, 100, 100, 100, 10, 1,
    ]  # fmt: skip


def test_depth_beyond_the_largest_of_millimetres_is_stored_in_another_unit(
    root: Path, tmp_path: Path, model, listener: Listener
) -> None:
    changes = [*FAST, "data.depth.range=[1.0, 80.0]", "data.depth.scale=0.02"]  # 20 to 80 m
    probe(make_options(root, tmp_path / "out", "depth", checkpoints=[model[0]], sources=["student"],
                       overrides=changes), listener)  # fmt: skip
    file = head(tmp_path, "out")
    loaded, description = load_head(file)
    branch = loaded.branches["depth"]
    branch[-1].weight.data.zero_()
    branch[-1].bias.data = torch.linspace(-50.0, 50.0, 256)  # nearly all on the last bin, 80 m
    save_head(file, loaded, description)
    done = apply_head(ApplyOptions(file, [str(root / "images/val")], tmp_path / "deep", device="cpu"), listener)
    assert done.notes == ["depth: centimetres in 16-bit PNGs."]
    assert json.loads((tmp_path / "deep/predictions.json").read_text())["units"] == {
        "depth": "centimetres in 16-bit PNGs"
    }
    depth = np.asarray(Image.open(tmp_path / "deep/depth/0.png"))
    assert 7800 < depth.min() <= depth.max() <= 8000  # 65,535 would be what 16 bits of millimetres can hold


def test_depth_that_fits_no_unit_is_a_reason_and_no_prediction(
    probed: Path, root: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = application._predict
    calls: list[int] = []

    def deep(*arguments):
        calls.append(1)
        found = real(*arguments)
        return {**found, "depth": found["depth"] * (100 if len(calls) == 1 else 1)}

    monkeypatch.setattr(application, "_predict", deep)
    options = ApplyOptions(head(probed, "depth_normals"), [str(root / "images/val")], tmp_path / "out", device="cpu")
    done = apply_head(options, listener)
    (reason,) = done.failures.values()
    assert reason.startswith("its depth reaches ")
    assert "and the files end at 65.535 m" in reason
    assert done.num_written == 3
    assert not (tmp_path / "out/normals/0.png").exists()


def test_memory_that_runs_out_names_what_to_change(
    probed: Path, root: Path, tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(application, "_predict", full)
    with pytest.raises(BrixelError, match=r"0.png: Out of memory predicting .*0.png\. Take another --device\."):
        apply_head(ApplyOptions(head(probed), [str(root / "images/val")], tmp_path / "out", device="cpu"), listener)


@pytest.mark.parametrize("source", ["backbone", "student", "teacher"])
def test_weights_of_the_backbone_that_were_rounded_are_taken(
    root: Path, probed: Path, tmp_path: Path, model, listener: Listener, source: str
) -> None:
    from safetensors.torch import load_file, save_file

    rounded = tmp_path / "rounded.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(model[1]).items()}, rounded)
    file = head(probed, source=source)
    images = [str(root / "images/val")]
    done = apply_head(ApplyOptions(file, images, tmp_path / "a", backbone_weights=str(rounded), device="cpu"), listener)
    assert done.num_written == 4
    # A head of an earlier version has no signature: the student's card has it, of the same weights.
    loaded, description = load_head(file)
    assert len(description.pop("backbone_signature")) == 64
    earlier = tmp_path / "earlier.safetensors"
    save_head(earlier, loaded, description)
    options = ApplyOptions(earlier, images, tmp_path / "b", backbone_weights=str(rounded), device="cpu")
    if source == "student":
        assert apply_head(options, listener).num_written == 4
    else:
        with pytest.raises(WeightsError, match="The weights of the backbone are not those that"):
            apply_head(options, listener)


def test_bad_images_are_listed_and_the_others_predicted(probed: Path, tmp_path: Path, listener: Listener) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    make_photograph(folder / "good.png", 1, 80, 60)
    make_photograph(folder / "thin.png", 1, 900, 20)
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:-3000])
    (folder / "text.jpg").write_text("text")
    done = apply_head(ApplyOptions(head(probed), [str(folder)], tmp_path / "out", device="cpu"), listener)
    assert done.num_written == 1
    assert set(done.failures) == {"cut.png", "text.jpg", "thin.png"}
    assert "not an image" in done.failures["text.jpg"]
    assert done.failures["thin.png"] == "too elongated: 900x20 pixels, over 8:1"
    (folder / "good.png").unlink()
    with pytest.raises(
        BrixelError, match=r"(?s)None of the 3 images found can be used\.\n  cut.png: .*\nName others with"
    ):
        apply_head(ApplyOptions(head(probed), [str(folder)], tmp_path / "out2", device="cpu"), listener)


def test_predictions_of_two_heads_are_not_mixed(root: Path, probed: Path, tmp_path: Path, listener: Listener) -> None:
    images = [str(root / "images/val")]
    apply_head(ApplyOptions(head(probed), images, tmp_path / "out", device="cpu"), listener)
    apply_head(ApplyOptions(head(probed), images, tmp_path / "out", device="cpu"), listener)  # the same one may
    other = ApplyOptions(head(probed, source="teacher"), images, tmp_path / "out", device="cpu")
    with pytest.raises(
        UsageError, match=r"out holds predictions of another head\. Give --overwrite, or another folder"
    ):
        apply_head(other, listener)
    apply_head(ApplyOptions(other.head, images, tmp_path / "out", device="cpu", overwrite=True), listener)


def test_other_weights_are_refused(root: Path, probed: Path, tmp_path: Path, model, listener: Listener) -> None:
    from brixel_cli import load_student
    from brixel_cli.core.student import read_adapter, save_student

    images = [str(root / "images/val")]
    other = Path(shutil.copytree(model[0], tmp_path / "other"))
    state = load_student(other).adapter.state_dict()
    state["out.1.bias"] += 1
    save_student(other / "student.safetensors", state, read_adapter(str(other)).card)
    with pytest.raises(
        WeightsError, match=r"The weights of the student are not those that .* Name them with --checkpoint"
    ):
        apply_head(ApplyOptions(head(probed), images, tmp_path / "out", checkpoint=str(other), device="cpu"), listener)
    from safetensors.torch import load_file, save_file

    weights = load_file(model[1])
    weights["norm.bias"] += 1
    save_file(weights, tmp_path / "vit.safetensors")
    changed = ApplyOptions(
        head(probed, source="teacher"),
        images,
        tmp_path / "out",
        backbone_weights=str(tmp_path / "vit.safetensors"),
        device="cpu",
    )
    with pytest.raises(
        WeightsError, match=r"The weights of the backbone are not those .* Name them with --backbone-weights"
    ):
        apply_head(changed, listener)


def test_a_head_on_features_from_elsewhere_cannot_be_applied(root: Path, tmp_path: Path, listener: Listener) -> None:
    source = str(write_features(tmp_path / "noise.h5", root, noise(4)))
    probe(make_options(root, tmp_path / "out", sources=[source], overrides=FAST), listener)
    options = ApplyOptions(head(tmp_path, "out", "file_noise.h5"), [str(root / "images/val")], device="cpu")
    with pytest.raises(BrixelError, match=r"was trained on the features of .*noise.h5, which brixel cannot compute"):
        apply_head(options, listener)


def test_a_head_on_an_extracted_file_is_applied_with_its_model(
    root: Path, tmp_path: Path, model, listener: Listener
) -> None:
    from brixel_cli.config.extract import ExtractOptions
    from brixel_cli.engines.extracting.extraction import extract

    extract(
        ExtractOptions(
            [str(root / "images")],
            res=32,
            checkpoint=model[0],
            output=tmp_path / "f.h5",
            device="cpu",
            precision="float32",
        ),
        listener,
    )
    probe(make_options(root, tmp_path / "out", sources=[str(tmp_path / "f.h5")], overrides=FAST), listener)
    images = [str(root / "images/val")]
    file = head(tmp_path, "out", "file_f.h5")
    with pytest.raises(UsageError, match="was trained on a feature file of a student: name it with --checkpoint"):
        apply_head(ApplyOptions(file, images, tmp_path / "masks", device="cpu"), listener)
    done = apply_head(ApplyOptions(file, images, tmp_path / "masks", checkpoint=model[0], device="cpu"), listener)
    assert done.num_written == 4


def test_whole_images_are_predicted_at_the_scale_of_their_evaluation(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["protocol.steps=2", "protocol.evaluate.scale=[2.0, 2.0]"]
    options = make_options(root, tmp_path / "out", sources=["backbone"], checkpoints=[model[0]], overrides=changes)
    assert probe(options, listener).results.sources["backbone"].input == {"64x80": 4}
    seen = []
    maps = FeatureExtractor.maps
    monkeypatch.setattr(FeatureExtractor, "maps", lambda self, px: seen.append(tuple(px.shape[2:])) or maps(self, px))
    apply_head(ApplyOptions(tmp_path / "out/heads/backbone_seed0.safetensors", [str(root / "images/val")],
                            tmp_path / "masks", device="cpu"), listener)  # fmt: skip
    assert set(seen) == {(64, 80)}  # 48x64 to a short side of twice 32, in patches of 16
