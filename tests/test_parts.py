"""What one pass gives besides the feature map: tokens, pooled vectors and the maps of other blocks."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import timm
import torch
from conftest import every_row, stopped_writing
from safetensors.torch import save_file

import brixel_cli
from brixel_cli.config.extract import ExtractOptions, Storage
from brixel_cli.config.extract_words import named_layers
from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.student import Student
from brixel_cli.data.feature_layout import Layout, MapWriter, encode_parts
from brixel_cli.data.images import load_image
from brixel_cli.data.resizing import Resizing
from brixel_cli.data.views import normalise_pixels
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.engines.extracting.verification import verify
from brixel_cli.errors import BrixelError, UsageError

ALL = {"fields": ("map", "cls", "pooled"), "layers": (0, 5)}


@pytest.fixture
def everything(extract_options, listener):
    """Options of a run that stores all that test_vit has, in float32, and the file of it."""
    options = extract_options(dtype="float32", **ALL)
    extract(options, listener)
    return options, brixel_cli.FeatureFile(options.output)


def test_datasets_have_a_row_for_each_image(everything) -> None:
    options, features = everything
    with h5py.File(options.output) as file:
        assert file.attrs["format"] == "brixel-features-2"
        # 160x200 px at --res 64 are 64x80: 4x5 patches of 16 px, and 16x20 locations of the student.
        shapes = {name: file[name].shape for name in ("features", "cls", "pooled", "layer_0", "layer_5")}
        assert shapes == {
            "features": (8, 64, 16, 20),
            "cls": (8, 64),
            "pooled": (8, 64),
            "layer_0": (8, 64, 4, 5),
            "layer_5": (8, 64, 4, 5),
        }
    assert features.parts == ["features", "cls", "pooled", "layer_0", "layer_5"]
    assert (features.description["fields"], features.description["layers"]) == (["map", "cls", "pooled"], [0, 5])


def test_values_are_those_of_timm(everything, model: tuple[str, str], photographs: Path) -> None:
    features = everything[1]
    backbone = load_backbone("test_vit", model[1])
    pixels = Resizing(64, "short", 16).apply(load_image(photographs / "3.png"))
    image = normalise_pixels(pixels, backbone.mean, backbone.std)[None]
    with torch.inference_mode():
        tokens = backbone.vit.forward_features(image)[0]  # the class token, then 4x5 patches
        first = backbone.vit.norm(backbone.vit.blocks[0](backbone.vit.norm_pre(
            backbone.vit._pos_embed(backbone.vit.patch_embed(image)))))[0]  # fmt: skip
    np.testing.assert_allclose(features.get("3.png", "cls"), tokens[0], atol=1e-4)
    np.testing.assert_allclose(features.get("3.png", "layer_5"), tokens[1:].T.reshape(64, 4, 5), atol=1e-4)
    np.testing.assert_allclose(features.get("3.png", "layer_0"), first[1:].T.reshape(64, 4, 5), atol=1e-4)
    np.testing.assert_allclose(features.get("3.png", "pooled"), features["3.png"].mean((1, 2)), atol=1e-4)


def test_the_map_does_not_change_and_alone_is_of_format_1(
    everything, extract_options, listener, tmp_path: Path
) -> None:
    alone = extract(extract_options(dtype="float32", output=tmp_path / "alone.h5"), listener).output
    with h5py.File(alone) as file:
        assert file.attrs["format"] == "brixel-features-1"
        assert "fields" not in brixel_cli.FeatureFile(alone).description
    for name in ("0.png", "7.png"):
        np.testing.assert_array_equal(brixel_cli.FeatureFile(alone)[name], everything[1][name])
    with pytest.raises(BrixelError, match=r"has no cls of its images; it has features. --fields and --layers"):
        brixel_cli.FeatureFile(alone).get("0.png", "cls")


@pytest.mark.parametrize("storage", ["h5", "safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    extract_options, mixed: Path, listener, tmp_path: Path, monkeypatch, storage: str, dtype: str
) -> None:
    chosen = {"inputs": [str(mixed)], "storage": storage, "dtype": dtype, **ALL}
    whole = every_row(extract(extract_options(output=tmp_path / "whole", **chosen), listener).output)
    options = extract_options(output=tmp_path / "stopped", **chosen)
    with stopped_writing(monkeypatch, MapWriter, 5) as written, pytest.raises(KeyboardInterrupt):
        extract(options, listener)
    done = extract(options, listener)
    assert (done.num_before, done.num_computed) == (len(written), 10 - len(written))
    assert every_row(done.output) == whole
    features = brixel_cli.FeatureFile(done.output)
    assert features.get("01.png", "layer_5").shape == (64, 4, 5)  # 96x128 px at --res 64: 64x85, rounded to 64x80
    assert features.get("01.png", "cls").shape == (64,)
    assert np.abs(features.get("01.png", "pooled") - features["01.png"].mean((1, 2))).max() < 0.02


def test_a_file_is_continued_only_with_the_same_parts(extract_options, listener, everything) -> None:
    with pytest.raises(UsageError, match=r'--fields: \["map", "cls", "pooled"\] -> \["map"\]'):
        extract(extract_options(dtype="float32"), listener)
    with pytest.raises(UsageError, match=r"--layers: \[0, 5\] -> \[0\]"):
        extract(extract_options(dtype="float32", **ALL | {"layers": (0,)}), listener)
    assert extract(everything[0], listener).num_before == 8


def test_a_file_of_format_1_is_continued_without_further_parts_alone(extract_options, listener) -> None:
    extract(extract_options(), listener)
    with pytest.raises(UsageError, match=r'--fields: \["map"\] -> \["map", "cls"\]'):
        extract(extract_options(fields=("map", "cls")), listener)
    assert extract(extract_options(), listener).num_before == 8


def test_vectors_alone_are_small(extract_options, listener, tmp_path: Path) -> None:
    output = extract(extract_options(fields=("cls", "pooled"), pca=3, dtype="float32"), listener).output
    features = brixel_cli.FeatureFile(output)
    assert features.parts == ["cls", "pooled"]
    assert output.stat().st_size < 40_000  # the maps alone would take 8 * 64 * 320 * 4 bytes = 640 KiB
    with pytest.raises(BrixelError, match="has no features of its images; it has cls, pooled"):
        features["0.png"]
    with pytest.raises(BrixelError, match="holds no feature maps, only cls, pooled"):
        brixel_cli.FeatureDataset(output)
    # Components are of the map: those of its mean are the mean of those of the map.
    maps = extract(extract_options(pca=3, dtype="float32", output=tmp_path / "maps.h5"), listener).output
    expected = brixel_cli.FeatureFile(maps)["2.png"].mean((1, 2))
    np.testing.assert_allclose(features.get("2.png", "pooled"), expected, atol=1e-3)
    assert features.get("2.png", "cls").shape == (64,)


@pytest.mark.parametrize("storage", ["h5", "safetensors", "zarr"])
def test_registers_are_those_of_timm(photographs: Path, tmp_path: Path, storage: Storage) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit2", num_classes=0).state_dict(), tmp_path / "vit.safetensors")
    backbone = load_backbone("test_vit2", str(tmp_path / "vit.safetensors"))
    num = backbone.num_registers
    assert num > 0
    features = brixel_cli.extract(
        photographs, res=64, source="backbone", backbone="test_vit2", backbone_weights=tmp_path / "vit.safetensors",
        fields=["registers"], device="cpu", precision="float32", dtype="float32", output=tmp_path / "out.h5",
        format=storage,
    )  # fmt: skip
    pixels = Resizing(64, "short", 16).apply(load_image(photographs / "5.png"))
    with torch.inference_mode():
        tokens = backbone.vit.forward_features(normalise_pixels(pixels, backbone.mean, backbone.std)[None])[0]
    first = int(backbone.has_cls)
    np.testing.assert_allclose(features.get("5.png", "registers"), tokens[first : first + num], atol=1e-4)


def test_damage_of_a_vector_is_found(everything, listener) -> None:
    options, features = everything
    with h5py.File(options.output, "r+") as file:
        file["cls"][2, 5] += 1
    assert verify(options.output, listener).damaged == {features.paths[2]: "its map has changed since it was written"}
    assert extract(options, listener).num_computed == 1


def test_a_dataset_that_the_description_promises_must_be_there(everything) -> None:
    with h5py.File(everything[0].output, "r+") as file:
        del file["pooled"]
    with pytest.raises(BrixelError, match="it has no dataset pooled"):
        brixel_cli.FeatureFile(everything[0].output)


def test_int8_of_tokens_by_hand() -> None:
    # Of the token (1, -2, 4) the largest value is 4: its scale is 4/127, and the numbers 32, -64 (31.75, -63.5), 127.
    parts = {
        "registers": torch.tensor([[[1.0, -2.0, 4.0], [0.0, 127.0, 1.0]]]),
        "pooled": torch.tensor([[2.0, 1.0, 0.0]]),
    }
    stored, finite = encode_parts(parts, "int8", None)
    assert finite == [True]
    assert stored["registers"].tolist() == [[[32, -64, 127], [0, 127, 1]]]
    assert stored["registers_scale"].flatten().tolist() == pytest.approx([4 / 127, 1])
    assert stored["pooled"].tolist() == [[127, 64, 0]]
    assert stored["pooled_scale"].tolist() == [[pytest.approx(2 / 127)]]
    layout = Layout(((2, 2),), 3, "int8", fields=("registers", "pooled"), num_registers=2)
    shapes = {name: column.shape for name, column in layout.shapes((2, 2)).items()}
    assert shapes == {name: tuple(value.shape[1:]) for name, value in stored.items()}


def test_a_vector_that_is_not_finite_fails_its_image() -> None:
    parts = {"features": torch.ones(2, 3, 1, 1), "cls": torch.tensor([[1.0, 2.0, 3.0], [1e6, 0.0, 0.0]])}
    assert encode_parts(parts, "float16", None)[1] == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fields": ("map", "clas")},
            "--fields map,clas: give some of map, cls, registers, pooled, by commas, each once",
        ),
        ({"fields": ("map", "map")}, "each once"),
        ({"fields": ()}, "--fields names nothing, and there are no --layers"),
        ({"layers": (5, 5)}, "--layers 5,5: give each block once"),
        ({"storage": "npy", "layers": (5,)}, "--format npy stores the feature map alone: take --format h5 or"),
        ({"fields": ("cls",), "preview": True}, "--preview and --page show feature maps: add map to --fields cls"),
        ({"fields": ("cls",), "pca": 3}, "--pca is of the feature map and of pooled, and --fields cls names neither"),
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExtractOptions(["photos"], **changes)  # type: ignore[arg-type]


def test_numbers_of_layers() -> None:
    assert named_layers("5,8,11") == (5, 8, 11)
    assert named_layers(None) == ()
    with pytest.raises(
        UsageError, match="--layers takes numbers of blocks from 0 up, by commas, such as 5,8,11; not '-1'"
    ):
        named_layers("5,-1")


def test_what_the_backbone_has_not_is_refused(extract_options, listener) -> None:
    with pytest.raises(UsageError, match="--fields registers: test_vit has no register tokens"):
        extract(extract_options(fields=("registers",)), listener)
    with pytest.raises(UsageError, match=r"--layers 6: the blocks of test_vit are 0 to 5"):
        extract(extract_options(layers=(6,)), listener)
    with pytest.raises(UsageError, match="--fields cls: vit_base_patch16_siglip_224 has no class token"):
        extract(extract_options(fields=("cls",), source="backbone", backbone="vit_base_patch16_siglip_224",
                                checkpoint=None, backbone_weights="random"), listener)  # fmt: skip


def test_a_student_with_updated_weights_gives_tokens_of_those(model: tuple[str, str], backbone) -> None:
    student = brixel_cli.load_student(model[0], backbone_weights=model[1])
    images = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = Student.outputs(student, images, (2,))
        torch.testing.assert_close(found.map, Student.forward(student, images), rtol=0, atol=0)
        torch.testing.assert_close(found.layers[5], student.trunk.last_map(images), rtol=0, atol=0)
        assert found.registers.shape == (1, 0, 64)
