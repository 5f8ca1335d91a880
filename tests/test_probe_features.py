"""What a probe stores: that rows are what model and labels say, that filling goes on, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Listener, make_photograph
from PIL import Image
from probe_sets import HEIGHT, NAMES, WIDTH, make_options, noise, stored_levels, write_features
from torchvision.transforms.v2 import functional as tvf

from brixel_cli import load_student
from brixel_cli.data.crops import cut_image, cut_map, cut_target
from brixel_cli.data.row_store import Store
from brixel_cli.data.views import normalise_pixels
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.engines.probing.features import Targets, open_maps, prepare
from brixel_cli.engines.probing.probing import plan_only, plan_probe, probe
from brixel_cli.engines.runtime import Runtime
from brixel_cli.engines.streams import MOST_WORKERS, num_workers
from brixel_cli.errors import BrixelError, UsageError

ADE = ["protocol.train_labels=64", "protocol.train.per_image=2"]


def prepared(options, listener: Listener):
    plan = plan_probe(options, Runtime("cpu", "float32"), listener)
    prepare(plan, Runtime("cpu", "float32"), listener)
    return plan


@pytest.mark.parametrize("protocol", ["quick", "jafar", "dinov3-ade"])
def test_maps_are_what_the_model_says_of_each_field(
    root: Path, tmp_path: Path, model, listener: Listener, protocol: str
) -> None:
    changes = ADE if protocol == "dinov3-ade" else []
    plan = prepared(
        make_options(root, tmp_path / "out", protocol=protocol, checkpoints=[model[0]], overrides=changes), listener
    )
    student = load_student(model[0])
    calls = {"backbone": (student.backbone, 1), "student": (student, 1), "teacher": (student.backbone, 4)}
    for item in plan.sources:
        call, enlarge = calls[item.source.label]
        for split in (item.train, item.evaluate):
            maps = open_maps(item, split)
            for position in (0, len(split.crops) // 2, len(split.crops) - 1):
                crop = split.crops[position]
                image = Image.open(root / split.labelled.names[crop.row]).convert("RGB")
                seen = cut_image(image, crop, (crop.size[0] * enlarge, crop.size[1] * enlarge))
                pixels = normalise_pixels(tvf.pil_to_tensor(seen), student.backbone.mean, student.backbone.std)
                expected = call(pixels[None]).detach()
                torch.testing.assert_close(maps.read([position]), expected, atol=5e-3, rtol=5e-3)
                assert tuple(expected.shape[2:]) == maps.grids[position]


def test_each_protocol_has_the_fields_that_it_says(root: Path, tmp_path: Path, model, listener: Listener) -> None:
    def crops(protocol: str, *changes: str):
        options = make_options(
            root,
            tmp_path / "out",
            protocol=protocol,
            checkpoints=[model[0]],
            overrides=list(changes),
            sources=["backbone"],
        )
        item = plan_only(options, listener).sources[0]
        return item.train, item.evaluate

    train, evaluate = crops("jafar")
    assert (len(train.crops), len(evaluate.crops)) == (12, 4)  # each training image also mirrored
    assert [crop.flip for crop in train.crops[:4]] == [False, True, False, True]
    assert train.positions[1] == [2, 3]
    assert {crop.size for crop in train.crops} == {(32, 32)}
    assert set(train.target_sizes) == set(evaluate.target_sizes) == {(448, 448)}
    train, evaluate = crops("dinov3-ade", *ADE)
    assert (len(train.crops), set(train.target_sizes)) == (12, {(64, 64)})
    assert evaluate.slides
    assert len(evaluate.crops) == 8  # 32x43 is covered by two windows of 32
    assert evaluate.target_sizes == [(HEIGHT, WIDTH)] * 4
    train, evaluate = crops("quick")
    assert {crop.size for crop in train.crops} == {(32, 48)}
    assert set(train.target_sizes) == {(HEIGHT, WIDTH)}


def test_targets_are_those_of_the_set(root: Path, tmp_path: Path, model, listener: Listener) -> None:
    options = make_options(root, tmp_path / "out", protocol="jafar", checkpoints=[model[0]], sources=["backbone"])
    split = prepared(options, listener).sources[0].train
    targets = Targets(split, "segmentation")
    for position in (0, 3, 11):
        crop = split.crops[position]
        labels = stored_levels(root, split.labelled.names[crop.row], "labels").astype(np.uint8)  # void: 255
        expected = cut_target(labels, crop, (448, 448))
        assert np.array_equal(targets.read(position)["segmentation"].numpy(), expected)


def test_depth_and_normals_are_stored_as_they_are(root: Path, tmp_path: Path, model, listener: Listener) -> None:
    options = make_options(
        root, tmp_path / "out", "depth_normals", checkpoints=[model[0]], sources=["backbone"],
        overrides=["data.depth.crop=[8, 40, 10, 60]"],
    )  # fmt: skip
    item = prepared(options, listener).sources[0]
    for split, dtype in ((item.train, torch.float16), (item.evaluate, torch.float32)):
        stored, sample = Targets(split, "depth_normals").read(1), split.labelled.load(1)
        valid = sample.valid if split is item.evaluate else np.ones_like(sample.valid)
        assert (stored["depth"].dtype, tuple(stored["depth"].shape)) == (dtype, (1, HEIGHT, WIDTH))
        np.testing.assert_array_equal(stored["depth"][0].float().numpy(), np.where(valid, sample.depth, 0))
        np.testing.assert_allclose(stored["normals"].float().numpy(), np.where(valid, sample.normals, 0), atol=1e-3)
    assert stored["depth"][0, :8].abs().max() == 0  # outside the evaluation crop


def test_filling_goes_on_where_it_stopped(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = make_options(root, tmp_path / "out", checkpoints=[model[0]], sources=["student"])
    item = prepared(options, listener).sources[0]
    expected = open_maps(item, item.train).read(range(6))
    store = Store(item.train.maps.path, writable=True)
    for row in (1, 4):
        store.put("features", [row], [np.zeros(store.array("features").shape[1:], np.float16)])
        store.mark(row, 0)
    seen = []
    maps = FeatureExtractor.maps
    monkeypatch.setattr(FeatureExtractor, "maps", lambda self, pixels: seen.append(len(pixels)) or maps(self, pixels))
    item = prepared(options, listener).sources[0]
    assert seen == [6]  # the whole batch: another one would give other bits
    assert torch.equal(open_maps(item, item.train).read(range(6)), expected)


def test_other_weights_are_another_file(root: Path, tmp_path: Path, model, listener: Listener) -> None:
    from brixel_cli.core.student import read_adapter, save_student

    options = make_options(root, tmp_path / "out", checkpoints=[model[0]], sources=["student"])
    before = plan_only(options, listener).sources[0].train
    other = Path(shutil.copytree(model[0], tmp_path / "other"))
    assert (
        plan_only(make_options(root, tmp_path / "out", checkpoints=[str(other)], sources=["student"]), listener)
        .sources[0]
        .train.maps.path
        == before.maps.path
    )  # the same weights elsewhere
    state = load_student(other).adapter.state_dict()
    state["out.1.bias"] += 1
    save_student(other / "student.safetensors", state, read_adapter(str(other)).card)
    after = (
        plan_only(make_options(root, tmp_path / "out", checkpoints=[str(other)], sources=["student"]), listener)
        .sources[0]
        .train
    )
    assert after.maps.path != before.maps.path
    assert after.targets.path == before.targets.path


def test_maps_depend_on_the_images_and_not_on_the_targets(
    root: Path, tmp_path: Path, model, listener: Listener
) -> None:
    def parts(task: str, data: Path = root, *changes: str):
        options = make_options(
            data, tmp_path / "out", task, checkpoints=[model[0]], sources=["backbone"], overrides=list(changes)
        )
        item = plan_only(options, listener).sources[0]
        return item.evaluate.maps.path, item.evaluate.targets.path

    first = parts("depth")
    for other in (parts("normals"), parts("depth", root, "data.depth.range=[1.0, 3.0]")):
        assert other[0] == first[0]
        assert other[1] != first[1]
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    before = parts("depth", copy)
    make_photograph(copy / "images/val/0.png", 77, WIDTH, HEIGHT)
    after = parts("depth", copy)
    assert after[0] != before[0]
    assert after[1] != before[1]


def test_a_full_disk_is_found_before_anything_is_written(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    options = make_options(root, tmp_path / "out", checkpoints=[model[0]])
    with pytest.raises(BrixelError, match=r"Storing features and targets needs .* but .* has 1000 B free\. Make room"):
        prepared(options, listener)
    assert not (tmp_path / "out" / "features").exists()


def test_a_faulty_target_ends_the_probe_by_name(root: Path, tmp_path: Path, model, listener: Listener) -> None:
    broken = Path(shutil.copytree(root, tmp_path / "set"))
    Image.fromarray(np.full((HEIGHT, WIDTH), 77, np.uint8)).save(broken / "labels/train/3.png")
    with pytest.raises(BrixelError, match=r"3\.png"):
        prepared(make_options(broken, tmp_path / "out", checkpoints=[model[0]]), listener)


def test_all_faulty_targets_of_a_split_are_reported_at_once(
    root: Path, tmp_path: Path, model, listener: Listener
) -> None:
    broken = Path(shutil.copytree(root, tmp_path / "set"))
    for name in ("1", "3"):
        Image.fromarray(np.full((HEIGHT, WIDTH), 77, np.uint8)).save(broken / f"labels/train/{name}.png")
    options = make_options(broken, tmp_path / "out", checkpoints=[model[0]])
    with pytest.raises(BrixelError, match=r"2 of 6 labelled images cannot be used:\n  2x: .*1\.png"):
        prepared(options, listener)
    shutil.copytree(root / "labels", broken / "labels", dirs_exist_ok=True)  # corrected, the probe goes on
    prepared(options, listener)


def test_features_that_are_no_numbers_are_refused(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = FeatureExtractor.maps
    monkeypatch.setattr(FeatureExtractor, "maps", lambda self, pixels: maps(self, pixels) * 1e9)
    with pytest.raises(BrixelError, match=r"images/train/0\.png: its features are no finite numbers in float16"):
        prepared(make_options(root, tmp_path / "out", checkpoints=[model[0]], sources=["backbone"]), listener)


# Feature files


def test_a_feature_file_is_read_by_path_or_by_name(root: Path, tmp_path: Path, listener: Listener) -> None:
    maps = noise(3)
    below = [name.removeprefix("images/") for name in NAMES]
    files = {
        "same": write_features(tmp_path / "same.h5", root, maps),
        "below": write_features(tmp_path / "below.h5", root / "images", lambda name: maps(f"images/{name}"), below),
        "moved": write_features(tmp_path / "moved.h5", Path("/elsewhere"), lambda n: maps(f"images/{n}"), below),
    }
    for name, file in files.items():
        item = plan_only(make_options(root, tmp_path / name, sources=[str(file)]), listener).sources[0]
        read = open_maps(item, item.evaluate).read([0, 2])
        expected = torch.from_numpy(np.stack([maps(NAMES[6]), maps(NAMES[8])]).astype(np.float16)).float()
        assert torch.equal(read, expected), name


def test_one_row_for_two_images_of_one_name_is_refused(root: Path, tmp_path: Path, listener: Listener) -> None:
    names = [f"{number}.png" for number in range(6)]  # of images/train; images/val has such names too
    file = write_features(tmp_path / "train.h5", root / "images" / "train", noise(3), names)
    text = refused(root, tmp_path, listener, sources=[str(file)])
    assert text.startswith(f"{file}: 0.png could be images/val/0.png and images/train/0.png. Extract the features of ")
    assert text.endswith(f"brixel extract --input {root} --output {file}")


def test_a_part_of_the_image_has_its_part_of_the_stored_map(root: Path, tmp_path: Path, listener: Listener) -> None:
    file = write_features(tmp_path / "f.h5", root, noise(3))
    options = make_options(root, tmp_path / "out", protocol="jafar", sources=[str(file)])
    item = plan_only(options, listener).sources[0]
    maps, crop = open_maps(item, item.train), item.train.crops[1]
    assert crop.flip
    assert maps.grids[1] == (12, 12)  # of 12x16, the middle three quarters
    whole = torch.from_numpy(noise(3)(NAMES[0]).astype(np.float16)).float()
    torch.testing.assert_close(maps.read([1])[0], cut_map(whole, crop, (12, 12)))


def refused(root: Path, tmp_path: Path, listener: Listener, **changes) -> str:
    with pytest.raises(BrixelError) as caught:
        plan_only(make_options(root, tmp_path / "out", **changes), listener)
    return str(caught.value)


def test_faulty_sources_are_refused(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    few = str(write_features(tmp_path / "few.h5", root, noise(2), NAMES[:7]))
    text = refused(root, tmp_path, listener, sources=[few])
    assert f"{few} has no features of 3 of the 4 images of the split, such as images/val/1.png." in text
    assert f"brixel extract --input {root} --output {few}" in text
    centre = str(write_features(tmp_path / "centre.h5", root, noise(2), fit="centre"))
    text = refused(root, tmp_path, listener, sources=[centre])
    assert "holds features of the middle of each image alone: extract them again with --fit short" in text
    text = refused(root, tmp_path, listener, sources=["teachers"])
    assert text.startswith(
        "--source teachers: give backbone, equal-cost, student, teacher, finetuned, unet:ENCODER, or a feature"
    )
    text = refused(root, tmp_path, listener, sources=["teacher", "teacher"], checkpoints=[model[0]])
    assert text == "The source teacher stands twice: name each once."
    assert "No feature file at absent.h5" in refused(root, tmp_path, listener, sources=["absent.h5"])
    text = refused(root, tmp_path, listener, backbone="test_vit")
    assert text.startswith("The student that comes with brixel is of ")


def test_several_students_are_told_apart(root: Path, tmp_path: Path, model, listener: Listener) -> None:
    for name in ("a/run", "b/run"):
        shutil.copytree(model[0], tmp_path / name)
    checkpoints = [str(tmp_path / "a/run"), str(tmp_path / "b/run")]
    plan = plan_only(make_options(root, tmp_path / "out", checkpoints=checkpoints), listener)
    assert [item.source.label for item in plan.sources] == ["backbone", "student a/run", "student b/run", "teacher"]


def test_without_a_checkpoint_the_student_is_the_one_that_comes_with_brixel(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model[0], tmp_path / "runs" / "mine")
    plan_only(make_options(root, tmp_path / "out"), listener)
    line = next(line for line in listener.said if line.startswith("student: dinov2_vits14, which comes with brixel"))
    assert line.endswith("; trained under runs, for --checkpoint: runs/mine")


def test_images_are_decoded_by_several_threads() -> None:
    assert 2 <= num_workers() <= MOST_WORKERS
    assert num_workers(3) == 3


def test_a_probe_of_backbone_and_teacher_needs_no_student(
    root: Path, tmp_path: Path, model, listener: Listener
) -> None:
    options = make_options(
        root, tmp_path / "out", sources=["backbone", "teacher"], backbone="test_vit", backbone_weights=model[1],
        overrides=["protocol.steps=2"],
    )  # fmt: skip
    done = probe(options, listener).results
    assert list(done.summary) == ["backbone", "teacher"]
    assert done.recovered_gap == {}


def test_a_protocol_for_another_task_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="The protocol jafar is for segmentation, not for depth: take another with"):
        make_options(root, tmp_path / "out", "depth", protocol="jafar")
    with pytest.raises(UsageError, match="--seeds must be at least 1, not 0"):
        make_options(root, tmp_path / "out", seeds=0)
