"""Networks that are trained end to end, as rows of a probe: rates, resuming, cost, few labels, saved predictions."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import Listener
from probe_sets import make_options, recipe_file, results
from safetensors.torch import load_file, save_file
from test_probe_command import invoke
from torch import nn

from brixel_cli.config.probe import ProbeOptions
from brixel_cli.config.supervised import SupervisedConfig
from brixel_cli.core import extras
from brixel_cli.core.backbone import Backbone
from brixel_cli.core.heads import HeadSpec, build_head
from brixel_cli.core.networks import finetuned, unet
from brixel_cli.engines.probing import supervised
from brixel_cli.engines.probing.folder import EMPTY
from brixel_cli.engines.probing.probing import probe
from brixel_cli.engines.probing.supervised import set_aside
from brixel_cli.engines.probing.training import labelled_images
from brixel_cli.errors import BrixelError, UsageError, WeightsError

SHORT = [
    "supervised.steps=4",
    "supervised.validate_every=2",
    "supervised.batch_size=2",
    "protocol.steps=4",
    "protocol.points=64",
]
SPEC = HeadSpec("segmentation", 64, 3)


def options_of(root: Path, output: Path, model: tuple[str, str], *overrides: str, **changes) -> ProbeOptions:
    given = {"sources": ["finetuned"], "checkpoints": [model[0]], **changes}
    return make_options(root, output, overrides=[*SHORT, *overrides], **given)


def weights(folder: Path, label: str = "finetuned") -> dict[str, bytes]:
    tensors = load_file(folder / "networks" / f"{label}_seed0.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_rates_fall_from_block_to_block_and_biases_do_not_decay(backbone: Backbone) -> None:
    network = finetuned(backbone, build_head(SPEC, 0), layer_decay=0.5)
    config = SupervisedConfig(lr=1e-4, scratch_lr=1e-3, weight_decay=0.05)
    found = {id(p): (group["peak"], group["weight_decay"]) for group in network.groups(config) for p in group["params"]}
    named = {name.removeprefix("trunk.backbone.vit."): found[id(p)] for name, p in network.named_parameters()}
    depth = len(backbone.vit.blocks)
    assert named[f"blocks.{depth - 1}.attn.qkv.weight"] == (1e-4, 0.05)
    assert named[f"blocks.{depth - 2}.attn.qkv.bias"] == (0.5e-4, 0.0)
    assert named["blocks.0.mlp.fc1.weight"] == (1e-4 * 0.5 ** (depth - 1), 0.05)
    assert named["patch_embed.proj.weight"] == (1e-4 * 0.5**depth, 0.05)
    assert named["norm.weight"] == (1e-4, 0.0)
    assert named["head.branches.segmentation.1.weight"] == (1e-3, 0.05)
    assert len(named) == len(list(network.parameters()))


def test_the_gradient_of_a_network_is_that_of_plain_modules(backbone: Backbone) -> None:
    head = build_head(SPEC, 0)
    branch = head.branches["segmentation"]
    plain = nn.Sequential(nn.BatchNorm2d(64), nn.Conv2d(64, 3, 1))
    plain.load_state_dict(copy.deepcopy(branch.state_dict()))
    network = finetuned(backbone, head, 0.75).train()
    images = torch.randn(2, 3, 32, 48)
    weight = backbone.vit.blocks[0].attn.qkv.weight
    gradients = []
    for call in (lambda: network(images)["segmentation"], lambda: plain(network.trunk(images))):
        network.zero_grad()
        (call() * torch.arange(3.0)[:, None, None]).square().sum().backward()
        gradients.append(weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_images_are_set_aside_and_labels_left_out_by_the_seed() -> None:
    training, validation = set_aside(list(range(20)), 0.15, 0)
    assert (len(training), len(validation)) == (17, 3)
    assert sorted(training + validation) == list(range(20))
    assert set_aside(list(range(20)), 0.15, 1)[1] != validation
    assert [len(part) for part in set_aside([4, 9], 0.15, 0)] == [1, 1]
    with pytest.raises(BrixelError, match="two labelled images or more"):
        set_aside([4], 0.15, 0)
    few, more = labelled_images(50, 0.1, 3), labelled_images(50, 0.5, 3)
    assert (len(few), len(more)) == (5, 25)
    assert set(few) < set(more)
    assert labelled_images(50, 0.1, 4) != few
    assert labelled_images(50, 1.0, 3) == list(range(50))
    assert len(labelled_images(3, 0.01, 0)) == 1


def test_a_backbone_is_trained_and_an_interrupted_training_goes_on_to_the_same_bits(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = probe(options_of(root, tmp_path / "whole", model), listener).results
    description = results(tmp_path / "whole")["sources"]["finetuned"]
    assert (description["kind"], description["input"], description["grid"]) == ("finetuned", {"32x48": 4}, {"2x3": 4})
    (run,) = whole.runs
    assert run.effort is not None
    assert (run.effort.labels, run.effort.steps, run.effort.best_step in (2, 4)) == (6, 4, True)
    assert run.effort.parameters > 300_000
    assert run.effort.gflop > 0
    stored, name = weights(tmp_path / "whole"), "blocks.0.attn.qkv.weight"
    original = load_file(model[1])[name]  # the backbone's own weights have changed
    assert stored[f"trunk.backbone.vit.{name}"] != original.numpy().tobytes()

    write, calls = supervised._write_state, []

    def stopping(*arguments) -> None:
        write(*arguments)
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(supervised, "_write_state", stopping)
    with pytest.raises(KeyboardInterrupt):
        probe(options_of(root, tmp_path / "cut", model), listener)
    assert (tmp_path / "cut" / "networks" / "finetuned_seed0.training").is_file()
    monkeypatch.setattr(supervised, "_write_state", write)
    cut = probe(options_of(root, tmp_path / "cut", model), listener).results
    assert weights(tmp_path / "cut") == stored
    assert cut.runs[0].figures == run.figures
    assert (tmp_path / "cut/curves/finetuned_seed0.jsonl").read_text() == (
        tmp_path / "whole/curves/finetuned_seed0.jsonl"
    ).read_text()
    assert not list((tmp_path / "cut" / "networks").glob("*.training"))


def test_a_damaged_state_begins_anew(root: Path, tmp_path: Path, model, listener: Listener) -> None:
    (tmp_path / "out" / "networks").mkdir(parents=True)
    (tmp_path / "out" / "results.json").write_text(EMPTY)
    (tmp_path / "out" / "networks" / "finetuned_seed0.training").write_bytes(b"damaged")
    assert probe(options_of(root, tmp_path / "out", model), listener).results.runs[0].effort.steps == 4
    assert invoke("--verify", str(tmp_path / "out"))[0] == 0
    (tmp_path / "out" / "networks" / "finetuned_seed0.safetensors").write_bytes(b"damaged")
    code, out, err = invoke("--verify", str(tmp_path / "out"))
    assert code == 1
    assert "finetuned_seed0.safetensors" in out + err


def test_training_stops_where_the_validation_gets_no_better(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.5, 0.4, 0.4, 0.9])
    monkeypatch.setattr(supervised, "_validate", lambda *_: {"miou": next(values)})
    changes = ["supervised.steps=40", "supervised.patience=2"]
    (run,) = probe(options_of(root, tmp_path / "out", model, *changes), listener).results.runs
    assert (run.effort.best_step, run.effort.steps) == (2, 6)


def test_predictions_of_a_network_and_of_a_head_give_the_same_row_again(
    root: Path, tmp_path: Path, model, listener: Listener
) -> None:
    def options(task: str, **changes) -> ProbeOptions:
        given = {"sources": ["finetuned", "backbone"], "checkpoints": [model[0]], **changes}
        return make_options(root, tmp_path / task, task, overrides=SHORT, save_predictions=True, **given)

    for task in ("segmentation", "depth_normals"):
        rows = {run.source: run.figures for run in probe(options(task), listener).results.runs}
        again = [f"{label} again={tmp_path / task / 'predictions' / f'{label}_seed0'}" for label in rows]
        theirs = make_options(root, tmp_path / f"{task} again", task, overrides=SHORT, sources=[], predictions=again)
        assert {run.source.removesuffix(" again"): run.figures for run in probe(theirs, listener).results.runs} == rows
    # A prediction that is lost is written again, from what is stored.
    mask = next((tmp_path / "segmentation" / "predictions").rglob("*.png"))
    content = mask.read_bytes()
    mask.unlink()
    probe(options("segmentation"), listener)
    assert mask.read_bytes() == content


def test_few_labels_are_the_same_for_all_rows_and_another_probe(root: Path, tmp_path: Path, model) -> None:
    command = [
        "--recipe", str(recipe_file(root)), "--checkpoint", model[0], "--seeds", "1", "--device", "cpu",
        *(word for change in SHORT for word in ("--set", change)), "--source", "backbone", "--source", "finetuned",
    ]  # fmt: skip
    code, out, err = invoke(*command, "--label-fraction", "0.5", "--output", str(tmp_path / "out"))
    assert code == 0, err
    assert "Labels of 3 training images were used: others for each seed, the same for all rows." in out
    row = next(line for line in out.partition("Networks trained end to end")[2].splitlines() if "finetuned" in line)
    assert [word for word in row.split() if word.isdecimal()][:2] == ["3", "4"]  # labels, steps
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["label_fraction"] == 0.5
    code, _, err = invoke(*command, "--output", str(tmp_path / "out"))
    assert (code, "label_fraction: 0.5 -> 1.0" in err) == (2, True)


# U-Nets


def test_a_u_net_is_trained_at_the_teachers_input_too(root: Path, tmp_path: Path, listener: Listener) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="needs the extra unet")
    sources = ["unet:resnet18", "unet:resnet18@teacher"]
    changes = ["supervised.steps=2", "supervised.validate_every=1", "supervised.batch_size=2"]
    done = probe(make_options(root, tmp_path / "out", sources=sources, overrides=changes), listener).results
    described = results(tmp_path / "out")["sources"]
    # Without a backbone beside it, the input is not rounded to a patch: 32x43.
    assert [described[label]["input"] for label in sources] == [{"32x43": 4}, {"128x172": 4}]
    assert described["unet:resnet18"]["grid"] == {"32x43": 4}
    efforts = [run.effort for run in done.runs]
    assert efforts[0].parameters == efforts[1].parameters
    assert efforts[1].gflop > 6 * efforts[0].gflop  # 32x64 and 128x192 pixels, padded: 12 times the area


def test_a_u_net_takes_encoders_of_timm_and_weights_of_the_user(tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="needs the extra unet")
    head = build_head(HeadSpec("segmentation", 32, 3), 0)
    first = unet("test_resnet", head, None, seed=0).eval()
    assert first(torch.zeros(1, 3, 40, 70))["segmentation"].shape == (1, 3, 40, 70)
    encoder = dict(first.trunk.net.encoder.state_dict())
    save_file(encoder, tmp_path / "encoder.safetensors")
    save_file(first.trunk.net.state_dict(), tmp_path / "whole.safetensors")
    for name, decoder in (("encoder", False), ("whole", True)):
        other = unet("test_resnet", head, str(tmp_path / f"{name}.safetensors"), seed=1)
        same = {part: all(torch.equal(a, b) for a, b in zip(getattr(other.trunk.net, part).state_dict().values(),
                getattr(first.trunk.net, part).state_dict().values(), strict=True)) for part in ("encoder", "decoder")}  # fmt: skip
        assert same == {"encoder": True, "decoder": decoder}
        peaks = {group["peak"] for group in other.groups(SupervisedConfig())}
        assert peaks == {1e-4, 1e-3}  # what was trained, and the rest
    encoder.popitem()
    save_file(encoder, tmp_path / "encoder.safetensors")
    with pytest.raises(WeightsError, match="does not hold weights of the encoder test_resnet: 1 of its keys"):
        unet("test_resnet", head, str(tmp_path / "encoder.safetensors"), seed=0)
    with pytest.raises(UsageError, match="unet:resnet1000: there is no such encoder"):
        unet("resnet1000", head, None, seed=0)


@pytest.mark.parametrize(("given", "message"), [
    (["--source", "unet:"], "name the encoder, such as unet:resnet18"),
    (["--source", "finetune"], "finetuned, unet:ENCODER, or a feature file"),
    (["--source", "finetuned", "--label-fraction", "0"], "--label-fraction must be above 0 and at most 1, not 0"),
    (["--source", "finetuned", "--set", "supervised.step=3"], "supervised"),
])  # fmt: skip
def test_a_wrong_command_exits_with_2(root: Path, tmp_path: Path, model, given: list[str], message: str) -> None:
    recipe = ["--recipe", str(recipe_file(root)), "--checkpoint", model[0], "--output", str(tmp_path / "out")]
    code, _, err = invoke(*recipe, *given)
    assert (code, message in " ".join(err.split())) == (2, True), err


def test_a_loss_that_is_no_number_and_a_missing_package_say_what_to_do(
    root: Path, tmp_path: Path, model, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "outputs_loss", lambda outputs, *_: next(iter(outputs.values())).sum() * torch.nan)
    with pytest.raises(
        BrixelError, match=r"The loss is nan at step 2, seed 0. Lower the rates: --set supervised.lr=1e-05"
    ):
        probe(options_of(root, tmp_path / "out", model), listener)
    monkeypatch.setattr(extras, "find_spec", lambda name: None if "segmentation" in name else object())
    with pytest.raises(UsageError, match=r"unet:resnet18 needs segmentation_models_pytorch, .*'brixel\[unet\]'"):
        probe(options_of(root, tmp_path / "out2", model, sources=["unet:resnet18"]), listener)


def test_a_curve_over_labels_is_put_together_from_probes(
    root: Path, tmp_path: Path, answers: str, listener: Listener
) -> None:
    from label_curve import curve

    folders = []
    for fraction in (1.0, 0.5):
        folders.append(tmp_path / f"{fraction}")
        changes = ["protocol.steps=60", "protocol.lr=0.1"]
        probe(make_options(root, folders[-1], sources=[answers], overrides=changes, label_fraction=fraction), listener)
    assert curve(folders).splitlines() == [
        "| mIoU (%), mine | 50 % | 100 % |", "| --- | ---: | ---: |", "| file answers.h5 | 100.00 | 100.00 |",
    ]  # fmt: skip
    assert curve([*folders, folders[0]]) == curve(folders)
    probe(make_options(root, tmp_path / "other", sources=[answers], overrides=["protocol.steps=2"]), listener)
    with pytest.raises(SystemExit, match="protocol_settings.steps: 60 -> 2"):
        curve([folders[0], tmp_path / "other"])
