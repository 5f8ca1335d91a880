"""Functions from elsewhere as rows: found, called with what is documented, refused where they return something else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from brixel_cli.engines.benchmarking.methods import load_baseline
from brixel_cli.errors import BrixelError, UsageError

NEAREST = """
import torch.nn.functional as F

def nearest(images, feature_map, output_size):
    assert images.shape == (1, 3, 32, 48) and feature_map.shape == (1, 5, 2, 3)
    return F.interpolate(feature_map, output_size, mode="nearest").double()

def coarse(images, feature_map, output_size):
    return feature_map

def nothing(images, feature_map, output_size):
    return None

constant = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(NEAREST)
    return path


IMAGES, MAP = torch.zeros(1, 3, 32, 48), torch.arange(30.0).view(1, 5, 2, 3)


def test_a_function_of_a_file(file: Path) -> None:
    baseline = load_baseline(f"{file}:nearest")
    output = baseline(IMAGES, MAP, (4, 6))
    assert baseline.name == "nearest"
    assert output.dtype == torch.float32
    assert torch.equal(output, MAP.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_a_function_of_an_installed_module() -> None:
    assert load_baseline("torch.nn.functional:interpolate").function is torch.nn.functional.interpolate


@pytest.mark.parametrize(("name", "found"), [("coarse", "shape (1, 5, 2, 3)"), ("nothing", "a NoneType")])
def test_a_wrong_result_says_what_came_and_what_is_expected(file: Path, name: str, found: str) -> None:
    wanted = f"{name} returned {found}, expected a tensor of shape (1, 5, 4, 6): (batch, channels of the feature map"
    with pytest.raises(BrixelError, match=re.escape(wanted)):
        load_baseline(f"{file}:{name}")(IMAGES, MAP, (4, 6))


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nearest", "--baseline takes module:function or file.py:function, not nearest."),
        ("absent.py:f", "--baseline: no file absent.py."),
        ("brixel_absent:f", "--baseline brixel_absent:f: No module named 'brixel_absent'."),
        ("FILE:absent", "FILE has no function absent."),
        ("FILE:constant", "FILE has no function constant."),
    ],
)
def test_what_cannot_be_found_is_named(file: Path, reference: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message.replace("FILE", str(file)))):
        load_baseline(reference.replace("FILE", str(file)))


def test_the_example_of_the_documentation_works(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "BENCHMARK.md").read_text(encoding="utf-8")
    example = page.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "bilateral.py").write_text(example)
    baseline = load_baseline(f"{tmp_path / 'bilateral.py'}:upsample")
    # The left half of the image is dark, the right half bright, and so are the features; the edge is within a cell.
    images = torch.zeros(1, 3, 32, 32)
    images[..., 8:] = 4.0
    coarse = torch.zeros(1, 2, 4, 4)
    coarse[..., 1:] = 1.0
    output = baseline(images, coarse, (16, 16))
    assert output.shape == (1, 2, 16, 16)
    inside = output[0, 0, 4:12]
    assert inside[:, :4].max() < 0.01  # columns of the dark cell
    assert inside[:, 4:12].min() > 0.99
