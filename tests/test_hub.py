"""Students on the hub: sent by a run, loaded by name and revision; against a stand-in on the loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY
from hub import SHA, Hub, hub
from typer.testing import CliRunner

import brixel_cli
from brixel_cli.app import app
from brixel_cli.config.files import load_recipe
from brixel_cli.core.backbone import load_backbone
from brixel_cli.errors import WeightsError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def on_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub that this process talks to, without what an earlier test downloaded."""
    with hub() as state:
        monkeypatch.setenv("HF_TOKEN", state.token)
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            template = state.url + ("/{repo_id}/resolve/{revision}/{filename}" if "URL" in name else "")
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield state


def push(run: Path, *more: str) -> tuple[int, str]:
    result = CliRunner().invoke(
        app, ["distill", "--resume", "--output", str(run), "--push-to-hub", "someone/sharp", *more]
    )
    return result.exit_code, result.stderr


def test_a_finished_run_is_sent_and_loaded_again(run: Path, on_hub: Hub) -> None:
    code, err = push(run)
    assert code == 0, err
    assert f"sent to {on_hub.url}/someone/sharp" in err
    sent = on_hub.files["someone/sharp"]
    assert set(sent) == {"student.safetensors", "config.json", "recipe.yaml", "README.md"}
    assert str(run.parent).encode() not in b"".join(sent.values())  # no path of this machine
    config = json.loads(sent["config.json"])
    assert (config["backbone"], config["factor"], config["backbone_weights"]) == ("test_vit", 4, "pretrained")
    _, front, card = sent["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "brixel"
    best = json.loads((run / "results.json").read_text())["best"]
    assert f"| cosine | {best['backbone']['cosine']:.3f} | {best['student']['cosine']:.3f} |" in card
    example = card.partition("```python\n")[2].partition("```")[0]
    assert example.startswith('import brixel_cli\n\nstudent = brixel_cli.load_student("hf-hub:someone/sharp")\n')
    weights = run.parent / "vit.safetensors"
    for name in ("hf-hub:someone/sharp", "hf-hub:someone/sharp@v2", f"hf-hub:someone/sharp@{SHA}"):
        loaded = brixel_cli.load_student(name, backbone_weights=weights)
        there = brixel_cli.load_student(run)
        image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        assert torch.equal(loaded(image), there(image))
    with pytest.raises(brixel_cli.errors.WeightsError, match="@v3 could not be downloaded from the hub"):
        brixel_cli.load_student("hf-hub:someone/sharp@v3")


def test_the_recipe_that_is_sent_can_be_read(run: Path, on_hub: Hub, tmp_path: Path) -> None:
    assert push(run)[0] == 0
    (tmp_path / "sent.yaml").write_bytes(on_hub.files["someone/sharp"]["recipe.yaml"])
    recipe = load_recipe(str(tmp_path / "sent.yaml"))
    assert (recipe.backbone.weights, recipe.optim.steps) == ("pretrained", 4)
    assert "/" not in recipe.data.images


def test_what_keeps_a_student_from_being_sent_is_found_before_the_training(
    tmp_path: Path, photographs: Path, on_hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY.replace("PHOTOS", str(photographs)))
    command = ["distill", "--recipe", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run"), "--push-to-hub"]

    def refused(name: str) -> str:
        result = CliRunner().invoke(app, [*command, name])
        assert result.exit_code == 2
        return result.stderr

    assert "--push-to-hub takes user/name, not sharp." in refused("sharp")
    command.insert(1, "--dry-run")
    assert "--push-to-hub takes user/name, not a/b/c." in refused("a/b/c")
    command.remove("--dry-run")
    assert "backbone.weights=random, which nobody else could have" in refused("someone/sharp")
    monkeypatch.delenv("HF_TOKEN")
    assert "needs a token that may write, in the environment variable HF_TOKEN" in refused("someone/sharp")
    assert on_hub.asked == []
    assert not (tmp_path / "run").exists()


def test_a_refusal_of_the_hub_leaves_the_run_and_says_how_to_go_on(run: Path, on_hub: Hub) -> None:
    on_hub.refuse = True
    code, err = push(run)
    assert code == 1
    assert "error: The student could not be sent to someone/sharp: " in err
    assert f"brixel distill --resume --output {run} --push-to-hub someone/sharp" in err
    assert on_hub.token not in err
    assert (run / "student.safetensors").is_file()


@pytest.mark.parametrize("load", [
    lambda: brixel_cli.load_student("hf-hub:someone/never-seen"),
    lambda: load_backbone("test_vit3"),
])  # fmt: skip
def test_a_hub_that_does_not_answer_is_named_within_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, load: Callable[[], object]
) -> None:
    """Its client would try again for 23 seconds, for each file."""
    nobody = "http://127.0.0.1:9"  # no server is there
    for name, value in (("ENDPOINT", nobody), ("HF_HUB_OFFLINE", False), ("HF_HUB_CACHE", str(tmp_path))):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    began = time.monotonic()
    with pytest.raises(WeightsError, match=rf"could not be downloaded from the hub: .*{nobody} does not answer: "):
        load()
    assert time.monotonic() - began < 6


def test_torch_hub_loads_a_student(model: tuple[str, str]) -> None:
    load = f"torch.hub.load({str(ROOT)!r}, 'student', {model[0]!r}, source='local', trust_repo=True)"
    code = f"import torch; print(type({load}).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "ImageStudent\n", done.stderr
