"""The page of features without a browser: what its file holds, how well it stands for the full maps, and its options."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Listener, make_photograph
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import brixel_cli
from brixel_cli.app import app
from brixel_cli.core.formatting import human_bytes
from brixel_cli.drawing.feature_page import PageImage, feature_page
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.engines.models import FeatureExtractor
from brixel_cli.errors import UsageError

HOSTILE = "</script><img src=x onerror=alert(1)>.png"


def page_data(html: str) -> dict:
    """What the page holds."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def page_vectors(data: dict) -> list[dict[str, np.ndarray]]:
    """Unit vectors (K, h, w) of each image by source, as the page computes them, with NumPy alone."""
    values = np.frombuffer(zlib.decompress(base64.b64decode(data["maps"])), np.int8)
    images, at = [], 0
    for image in data["images"]:
        maps: dict[str, np.ndarray] = {}
        for source, (height, width) in zip(data["sources"], image["grids"], strict=True):
            count = len(data["offset"]) * height * width
            planes = values[at : at + count].reshape(-1, height, width)
            vectors = planes * np.float64(data["step"]) + np.array(data["offset"])[:, None, None]
            maps[source] = vectors / np.linalg.norm(vectors, axis=0).clip(1e-30)
            at += count
        images.append(maps)
    assert at == len(values)
    return images


def smooth_map(seed: int, channels: int = 96, side: int = 16) -> Tensor:
    """A map whose neighbours are alike, of about ten components and some noise."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, 10, generator=torch.Generator().manual_seed(99))
    coarse = torch.randn(1, 10, 4, 4, generator=random)
    fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")[0]
    return torch.einsum("dk,khw->dhw", mixing, fine) + 2 + 0.1 * torch.randn(channels, side, side, generator=random)


@pytest.fixture
def images() -> list[PageImage]:
    picture = Image.new("RGB", (1000, 500), "teal")
    return [
        PageImage(name, picture, {"student": smooth_map(n), "backbone": smooth_map(n + 9, side=4)})
        for n, name in enumerate([HOSTILE, "b.png"])
    ]


def test_vectors_of_the_page_give_the_cosines_of_the_full_ones(images: list[PageImage]) -> None:
    page = feature_page("a page", images)
    data = page_data(page.html)
    for image, vectors in zip(images, page_vectors(data), strict=True):
        for source, map_ in image.maps.items():
            full = torch.nn.functional.normalize(map_, dim=0).flatten(1).numpy()
            small = vectors[source].reshape(len(data["offset"]), -1)
            np.testing.assert_allclose(small.T @ small, full.T @ full, atol=0.03)
    assert page.correlation >= page.worst > 0.99
    assert f"{page.worst:.4f} for the worst image ({page.worst_of})" in data["note"]
    assert "64 components instead of 96 channels" in data["note"]


def test_the_correlation_is_that_of_the_heat_maps(images: list[PageImage]) -> None:
    page = feature_page("a page", images)
    data, found = page_data(page.html), []
    for image, vectors in zip(images, page_vectors(data), strict=True):
        for source, map_ in image.maps.items():
            full = torch.nn.functional.normalize(map_, dim=0).flatten(1).numpy()
            small = vectors[source].reshape(len(data["offset"]), -1)
            points = np.linspace(0, full.shape[1] - 1, min(32, full.shape[1])).round().astype(int)
            rows = [np.corrcoef(full[:, n] @ full, small[:, n] @ small)[0, 1] for n in points]
            found.append(np.mean(rows))
    assert page.correlation == pytest.approx(np.mean(found), abs=1e-5)
    assert page.worst == pytest.approx(np.min(found), abs=1e-5)


def test_maps_that_are_the_same_everywhere_have_a_page(images: list[PageImage]) -> None:
    flat = PageImage("flat", images[0].picture, {"student": torch.ones(8, 4, 4), "backbone": torch.zeros(8, 2, 2)})
    page = feature_page("flat", [flat])
    assert page.correlation == page.worst == 1
    assert np.isfinite(page_vectors(page_data(page.html))[0]["student"]).all()


def test_the_file_fetches_nothing_and_takes_no_name_as_html(images: list[PageImage]) -> None:
    html = feature_page(HOSTILE, images).html
    assert html.count("</script>") == 2
    assert HOSTILE not in html
    assert page_data(html)["images"][0]["name"] == HOSTILE
    assert "default-src 'none'" in html
    assert not re.search(r"(src|href)=.?(https?:|//)", html)


def test_pictures_are_jpeg_and_at_most_so_large(images: list[PageImage]) -> None:
    layered = PageImage("l", images[0].picture, images[0].maps, {"truth": Image.new("RGB", (30, 20))})
    (item,) = page_data(feature_page("p", [layered]).html)["images"]
    for text in (item["picture"], item["layers"][0]["picture"]):
        assert base64.b64decode(text)[:3] == b"\xff\xd8\xff"
    from io import BytesIO

    assert Image.open(BytesIO(base64.b64decode(item["picture"]))).size == (768, 384)
    assert item["layers"][0]["title"] == "truth"


def test_extract_writes_the_page_and_computes_nothing_again(
    extract_options, listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = extract(extract_options(), listener)
    seen = []
    maps = FeatureExtractor.maps
    monkeypatch.setattr(FeatureExtractor, "maps", lambda self, pixels: seen.append(pixels.shape) or maps(self, pixels))
    page = tmp_path / "below" / "page.html"
    again = extract(extract_options(page=page, page_images=3, page_sources=("student",)), listener)
    assert (again.num_computed, again.pictures, seen) == (0, [page], [])
    data = page_data(page.read_text())
    assert [image["name"] for image in data["images"]] == ["0.png", "4.png", "7.png"]  # evenly spread over eight
    features = brixel_cli.FeatureFile(done.output)
    for image, vectors in zip(data["images"], page_vectors(data), strict=True):
        full = features[image["name"]]
        full = full / np.linalg.norm(full, axis=0)
        small = vectors["student"]
        np.testing.assert_allclose(
            np.einsum("khw,k->hw", small, small[:, 3, 5]), np.einsum("dhw,d->hw", full, full[:, 3, 5]), atol=0.02
        )
    assert any("page.html: 3 images" in said and "correlate by" in said for said in listener.said)


def test_its_size_is_announced_before_it_is_written(
    extract_options, listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, announced = tmp_path / "page.html", []

    def write(path: Path, text: str) -> None:
        announced.extend(said for said in listener.said if str(path) in said)
        assert f"8 images, {human_bytes(len(text.encode()))};" in announced[0]

    monkeypatch.setattr("brixel_cli.engines.extracting.page.write_text", write)
    extract(extract_options(page=page), listener)
    assert len(announced) == 1
    assert not page.exists()


@pytest.mark.parametrize("pca", [None, 40])
def test_other_sources_are_computed_for_the_images_of_the_page(
    extract_options, listener: Listener, tmp_path: Path, pca: int | None
) -> None:
    page = tmp_path / "page.html"
    sources = ("student", "backbone", "teacher")
    extract(extract_options(page=page, page_images=2, page_sources=sources, pca=pca), listener)
    data = page_data(page.read_text())
    assert data["sources"] == list(sources)
    assert data["images"][0]["grids"] == [[16, 20], [4, 5], [16, 20]]
    assert data["finest"] == 2
    own = tmp_path / "teacher.h5"
    extract(extract_options(source="teacher", output=own), listener)
    full = brixel_cli.FeatureFile(own)["0.png"]
    full = full / np.linalg.norm(full, axis=0)
    small = page_vectors(data)[0]["teacher"]
    np.testing.assert_allclose(
        np.einsum("khw,k->hw", small, small[:, 3, 5]), np.einsum("dhw,d->hw", full, full[:, 3, 5]), atol=0.02
    )


def test_the_command_names_the_page(model, photographs: Path, tmp_path: Path) -> None:
    arguments = ["extract", "--input", str(photographs), "--res", "64", "--checkpoint", model[0], "--device", "cpu"]
    arguments += ["--output", str(tmp_path / "o.h5"), "--page", str(tmp_path / "p.html"), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["pictures"] == [str(tmp_path / "p.html")]
    data = page_data((tmp_path / "p.html").read_text())
    assert data["sources"] == ["student", "backbone"]
    assert len(data["images"]) == 8


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"page": Path("page.htm")}, "must end in .html"),
        ({"page_sources": ("student", "cat")}, "--page-sources student,cat: give some of student, backbone, teacher"),
        ({"page_sources": ("student", "student")}, "each once"),
        ({"page_images": 0}, "--page-images must be at least 1"),
    ],
)
def test_options_that_make_no_page(extract_options, changes: dict, named: str) -> None:
    with pytest.raises(UsageError, match=re.escape(named)):
        extract_options(**changes)


def test_an_image_at_odds_with_its_name_is_shown_as_the_model_saw_it(
    extract_options, listener: Listener, tmp_path: Path
) -> None:
    make_photograph(tmp_path / "wide.png", 3, width=300, height=100)
    page = tmp_path / "page.html"
    extract(extract_options(inputs=[str(tmp_path / "wide.png")], fit="centre", page=page), listener)
    (item,) = page_data(page.read_text())["images"]
    from io import BytesIO

    assert Image.open(BytesIO(base64.b64decode(item["picture"]))).size == (100, 100)
