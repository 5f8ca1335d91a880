"""Functions from elsewhere as rows: found, called with what is documented, refused where they return something else."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import Listener
from probe_sets import FAST, make_options

from brixel_cli.config.probe import ApplyOptions
from brixel_cli.core.identity import file_sha256
from brixel_cli.data.views import resize_view
from brixel_cli.engines.baselines import load_baseline
from brixel_cli.engines.benchmarking.methods import make_methods
from brixel_cli.engines.memory import check_batch
from brixel_cli.engines.models import FeatureExtractor, model_spec
from brixel_cli.engines.probing.application import apply_head
from brixel_cli.engines.probing.features import open_maps
from brixel_cli.engines.probing.probing import plan_only, probe
from brixel_cli.engines.probing.results import BaselineDescription, ModelDescription
from brixel_cli.engines.runtime import Runtime
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


# A larger guide image


GUIDED = """
import torch
import torch.nn.functional as F

def guided(images, feature_map, output_size):
    # Each channel is the guide's mean colour in the cell: what it sees can be read off its map.
    colours = F.adaptive_avg_pool2d(images, output_size).mean(1, keepdim=True)
    return feature_map.mean((-2, -1), keepdim=True) * 0 + colours * images.shape[-2]

guided.guide_size = 96

def plain(images, feature_map, output_size):
    return F.interpolate(feature_map, output_size, mode="bilinear")

def wrong(images, feature_map, output_size):
    return feature_map

wrong.guide_size = "large"
"""


@pytest.fixture
def guided(tmp_path: Path) -> Path:
    path = tmp_path / "guided.py"
    path.write_text(GUIDED)
    return path


def test_a_guide_has_the_proportions_of_the_input_and_is_never_smaller(guided: Path) -> None:
    baseline = load_baseline(f"{guided}:guided")
    assert baseline.guide_size((32, 48)) == (96, 144)  # 3 times both sides
    assert baseline.guide_size((48, 32)) == (144, 96)
    assert baseline.guide_size((128, 160)) == (128, 160)  # larger already
    assert load_baseline(f"{guided}:plain").guide_size((32, 48)) == (32, 48)


def test_a_guide_size_that_is_no_number_is_refused(guided: Path) -> None:
    with pytest.raises(
        UsageError, match="wrong.guide_size is 'large'. Set it to the shorter side in pixels of the images"
    ):
        load_baseline(f"{guided}:wrong")


def test_the_benchmark_gives_the_guide_to_the_function_and_its_reduction_to_the_backbone(
    guided: Path, model: tuple[str, str]
) -> None:
    student = model_spec("student", checkpoint=model[0]).load_student()
    baselines = [load_baseline(f"{guided}:{name}") for name in ("guided", "plain")]
    rows = {row.label: row for row in make_methods(student, (32, 32), highres=True, baselines=baselines)}
    assert (rows["guided"].input_size, rows["plain"].input_size) == ((96, 96), (32, 32))
    with torch.inference_mode():
        images = torch.randn(1, 3, 96, 96)
        output = rows["guided"].call(images)
        # 8 x 8 cells of 12 x 12 pixels; the function multiplies by the height that it is given, 96.
        expected = 96 * images.mean(1).unfold(1, 12, 12).unfold(2, 12, 12).mean((-2, -1))
        assert torch.allclose(output[0, 0], expected[0], atol=1e-4)
        small = resize_view(images, (32, 32))
        assert torch.allclose(rows["plain"].call(small), rows["bilinear"].call(small), atol=1e-5)


def test_batches_of_a_baseline_are_small_everywhere_and_are_not_tried_out(
    guided: Path, model: tuple[str, str], listener: Listener
) -> None:
    spec, runtime = model_spec("backbone", checkpoint=model[0]), Runtime("cpu", "float32")
    extractor = FeatureExtractor(spec, runtime, listener, baseline=load_baseline(f"{guided}:guided"))
    extractor.runtime = SimpleNamespace(device=torch.device("cuda"))  # type: ignore[assignment]
    # 4 x 448 x 448 pixels in all: 802,816 / (448 x 640) = 2.8; of the smaller ones 16 at most.
    assert extractor.batch_sizes({(448, 640): 9, (96, 144): 9}, None) == {(448, 640): 2, (96, 144): 16}
    check_batch(extractor, {(4001, 4001): 1}, None)  # no multiple of the patch, which a guide need not be
    assert listener.said == listener.warned == []


def test_a_probe_has_rows_of_baselines_with_what_they_see_and_the_cost_of_a_pass(
    guided: Path, root: Path, tmp_path: Path, model: tuple[str, str], listener: Listener
) -> None:
    given = {
        "sources": ["backbone", "student", "teacher"], "checkpoints": [model[0]], "overrides": FAST,
        "baselines": [f"{guided}:guided", f"{guided}:plain"],
    }  # fmt: skip
    options = make_options(root, tmp_path / "out", **given)
    done = probe(options, listener).results
    assert list(done.summary) == ["backbone", "guided", "plain", "student", "teacher"]
    source = done.sources["guided"]
    assert isinstance(source, ModelDescription)
    # Images of 48x64 px with a shorter side of 32 are 32x48 px, patches of 16: 2x3 cells, 8x12 of a student of factor 4.
    assert (source.kind, source.input, source.grid) == ("baseline", {"96x144": 4}, {"8x12": 4})
    assert source.baseline == BaselineDescription("guided", file_sha256(guided), 96)
    assert {label: cost.input for label, cost in done.costs.items()} == {
        "backbone": (32, 48), "guided": (96, 144), "plain": (32, 48), "student": (32, 48), "teacher": (128, 192)
    }  # fmt: skip
    assert (
        done.costs["guided"].gflop == done.costs["plain"].gflop == done.costs["backbone"].gflop
    )  # no products in them
    assert done.costs["backbone"].gflop < done.costs["student"].gflop < done.costs["teacher"].gflop
    assert all(0 < cost.low <= cost.seconds <= cost.high for cost in done.costs.values())
    assert set(done.recovered_gap) == {"guided", "plain", "student"}
    # The row sees the pixels that the backbone sees: bilinear maps have the backbone's mean, to float16.
    plan = plan_only(options, listener)
    maps = {item.source.label: open_maps(item, item.evaluate).read([0])[0] for item in plan.sources}
    enlarged = F.interpolate(maps["backbone"][None], (8, 12), mode="bilinear")[0]
    assert torch.allclose(maps["plain"], enlarged, atol=0.02)
    again = probe(options, listener).results
    assert again.costs == done.costs  # not timed again
    head = tmp_path / "out" / "heads" / "guided_seed0.safetensors"
    with pytest.raises(BrixelError, match="trained on the maps of the upsampler guided, which --apply does not load"):
        apply_head(ApplyOptions(head, [str(root / "images/val")], tmp_path / "masks", device="cpu"), listener)
