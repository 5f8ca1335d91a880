"""The files of docs/peers: that each gives a map of the grid that is asked for, with a stand-in for the peer's own package."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peer_costs import gflop
from torch import Tensor, nn

from brixel_cli.engines.baselines import load_baseline
from brixel_cli.errors import UsageError

PEERS = Path(__file__).parent.parent / "docs" / "peers"
FUNCTIONS = [
    ("anyup", "anyup", None), ("anyup", "anyup_448", 448), ("naf", "naf", None), ("naf", "naf_448", 448),
    ("loftup", "loftup", None), ("loftup", "loftup_448", 448), ("featup", "featup", None), ("featup", "featup_448", 448),
    ("uplift", "uplift", None), ("vit_up", "vit_up", 448), ("jafar", "jafar", None), ("jafar", "jafar_448", 448),
]  # fmt: skip


class OfOutputSize(nn.Module):
    """AnyUp, NAF and JAFAR: (image, features, output_size)."""

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int]) -> Tensor:
        return F.interpolate(features, output_size)


class OfGuide(nn.Module):
    """LoftUp: (features, image), a map of the image's size. FeatUp's upsampler: the same, 16 times finer."""

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        return F.interpolate(features, image.shape[-2:])


class OfSteps(nn.Module):
    """UPLiFT: (image, features), twice as fine with each step."""

    iters = 4

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        return F.interpolate(features, scale_factor=2**self.iters)


class OfPoints(nn.Module):
    """ViT-Up: (images, points (B, N, 2)) -> (B, N, D); here the features are the points' x and y, and 0."""

    def forward(self, images: Tensor, points: Tensor) -> Tensor:
        assert (points.shape[-1], points.min() > 0, points.max() < 1) == (2, True, True)
        return F.pad(points, (0, 3))


HUB = {
    "wimmerth/anyup": OfOutputSize(), "valeoai/NAF": OfOutputSize(), "andrehuang/loftup": OfGuide(),
    "mhamilton723/FeatUp": SimpleNamespace(upsampler=OfGuide()), "mwalmer-umd/UPLiFT": OfSteps(),
    "krispinwandel/vit-up": OfPoints(),
}  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub without a network, and a clone of JAFAR of which nothing but the shapes is there."""
    monkeypatch.setattr(torch.hub, "load", lambda repository, name, **more: HUB[repository])
    package = tmp_path / "src" / "upsampler"
    package.mkdir(parents=True)
    (package / "jafar.py").write_text(
        "import torch\n\n\ndef create_coordinate(device='cuda'):\n    return device\n\n\n"
        "class JAFAR(torch.nn.Module):\n"
        "    def __init__(self, v_dim):\n        super().__init__()\n        self.scale = torch.nn.Parameter(torch.ones(v_dim))\n\n"
        "    def forward(self, image, features, size):\n        assert create_coordinate() == image.device\n"
        "        return torch.nn.functional.interpolate(features, size)\n"
    )
    torch.save({"jafar": {"scale": torch.ones(384)}}, tmp_path / "jafar.pth")
    monkeypatch.setenv("JAFAR_REPO", str(tmp_path))
    monkeypatch.setenv("JAFAR_WEIGHTS", str(tmp_path / "jafar.pth"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "src"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "src"]:
        del sys.modules[name]


@pytest.mark.parametrize(("file", "function", "guide"), FUNCTIONS, ids=[function for _, function, _ in FUNCTIONS])
def test_a_peer_gives_a_map_of_the_grid_that_is_asked_for(
    file: str, function: str, guide: int | None, stand_ins: None
) -> None:
    baseline = load_baseline(f"{PEERS / file}.py:{function}")
    assert baseline.guide_side == guide
    features = torch.arange(5 * 2 * 3.0).view(1, 5, 2, 3)
    output = baseline(torch.zeros(1, 3, *baseline.guide_size((28, 42))), features, (8, 12))
    assert output.shape == (1, 5, 8, 12)
    if function == "vit_up":  # centres of 12 columns and 8 rows: x = (column + 1/2) / 12, y = (row + 1/2) / 8
        assert output[0, :2, 3, 7].tolist() == pytest.approx([7.5 / 12, 3.5 / 8])
    elif function == "uplift":
        assert HUB["mwalmer-umd/UPLiFT"].iters == 2  # 2 rows to 8
    else:
        assert torch.allclose(output, features.repeat_interleave(4, -1).repeat_interleave(4, -2))


def test_the_cost_of_a_peer_is_counted_on_its_own_code_without_weights(tmp_path: Path) -> None:
    (tmp_path / "hubconf.py").write_text(
        "import torch\nimport torch.nn.functional as F\n\n\nclass Up(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.mix = torch.nn.Conv2d(3, 384, 1)\n\n"
        "    def forward(self, image, features, output_size):\n        return F.adaptive_avg_pool2d(self.mix(image), output_size)\n\n\n"
        "def anyup(pretrained=True):\n    assert not pretrained\n    return Up()\n"
    )
    hub = torch.hub.load
    found = gflop("anyup", str(tmp_path))
    assert torch.hub.load is hub
    assert list(found) == ["anyup", "anyup_448"]
    assert found["anyup"][0] == pytest.approx(2.9, abs=0.05)  # nearly all of it the backbone's
    assert found["anyup_448"][0] - found["anyup"][0] == pytest.approx(2 * 3 * 384 * (448**2 - 112**2) / 1e9)


def test_every_file_is_tested_and_named_in_the_page() -> None:
    page = (PEERS.parent / "PEERS.md").read_text(encoding="utf-8")
    assert {path.stem for path in PEERS.glob("*.py")} == {file for file, _, _ in FUNCTIONS}
    assert all(f"(peers/{path.name})" in page for path in PEERS.glob("*.py"))


def test_a_peer_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAFAR_REPO", raising=False)
    with pytest.raises(UsageError, match="jafar.py:jafar: set JAFAR_REPO to a clone of github.com/PaulCouairon/JAFAR"):
        load_baseline(f"{PEERS / 'jafar.py'}:jafar")
