"""Protocols: that each name means what is published, and that a change shows in the name."""

from __future__ import annotations

import math

import pytest
import torch

from brixel_cli.config.files import with_overrides
from brixel_cli.config.protocols import PROTOCOLS, differences, printed_name, published
from brixel_cli.engines.probing.plan import crops_of
from brixel_cli.errors import UsageError

# The table of docs/PROBE.md: side, head, BatchNorm, rate, weight decay, batch, steps, epochs, schedule.
TABLE = {
    "jafar": (448, "linear", False, 5e-4, 1e-5, 2, None, 20, "cosine"),
    "jafar-published": (448, "linear", False, 5e-4, 1e-5, 2, None, 20, "cosine"),
    "dinov3-ade": (512, "linear", True, 1e-3, 1e-3, 16, 40_000, None, "linear"),
    "dinov3-nyu": ([416, 544], "linear", True, 3e-4, 1e-4, 16, 38_400, None, "linear"),
    "brixel": (256, "linear", False, 1e-3, 0.01, 16, None, 20, "constant"),
    "brixel-nyu": ([288, 384], "readout", False, 1e-3, 0.01, 16, None, 80, "constant"),
    "normals": ([416, 544], "linear", True, 5e-4, 1e-4, 16, 38_400, None, "linear"),
    "quick": (None, "linear", True, 2e-3, 1e-4, 8, 1500, None, "cosine"),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_name_means_what_is_published(name: str) -> None:
    p = PROTOCOLS[name]
    assert (p.side, p.head, p.batch_norm, p.lr, p.weight_decay, p.batch_size, p.steps, p.epochs, p.schedule) == TABLE[
        name
    ]


def test_no_other_protocols_are_there() -> None:
    assert set(PROTOCOLS) == set(TABLE) | {"propagation", "matching"}  # which train nothing


def test_further_rules_of_single_protocols() -> None:
    assert PROTOCOLS["jafar"].train.flip
    assert (PROTOCOLS["jafar"].train_labels, PROTOCOLS["jafar"].evaluate_labels) == (448, 448)
    ade = PROTOCOLS["dinov3-ade"]
    assert (ade.train.scale, ade.evaluate.kind, ade.evaluate.stride) == ([0.5, 2.0], "slide", 341)
    assert PROTOCOLS["dinov3-nyu"].bins == 256
    assert not PROTOCOLS["dinov3-nyu"].align
    nyu = PROTOCOLS["brixel-nyu"]
    assert (nyu.depth_loss, nyu.gradient_weight, nyu.align) == ("silog", 0, True)
    assert all(p.evaluate_labels is None for name, p in PROTOCOLS.items() if name in TABLE and "jafar" not in name)


def test_the_published_code_of_jafar_steps_its_cosine_of_20_epochs_once_an_update() -> None:
    published, rerun = PROTOCOLS["jafar-published"], PROTOCOLS["jafar"]
    assert published.model_copy(update={"name": "jafar", "cosine_steps": None}) == rerun
    # Half a cosine in 20 steps: all of the rate, half of it, none; then back.
    rates = [published.learning_rate(step, 1000) for step in (0, 10, 20, 30, 40, 60)]
    assert rates == pytest.approx([5e-4, 2.5e-4, 0, 2.5e-4, 5e-4, 0], abs=1e-12)
    assert rerun.learning_rate(500, 1000) == pytest.approx(2.5e-4)
    # The same as torch's scheduler, which the published code uses.
    optimiser = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=20)
    for step in range(100):
        assert published.learning_rate(step, 1000) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimiser.step()
        scheduler.step()


def test_a_cosine_of_some_steps_needs_the_schedule_cosine() -> None:
    with pytest.raises(UsageError, match="protocol.cosine_steps is for schedule cosine without warm-up"):
        with_overrides(PROTOCOLS["brixel"], ["cosine_steps=20"], "protocol brixel")


def test_data_sets_with_rules_of_their_own() -> None:
    for name in ("ade20k", "ade20k_151"):
        assert (published("brixel", name).batch_size, published("brixel", name).epochs) == (32, 40)
    assert (published("brixel", "cityscapes").batch_size, published("brixel", "cityscapes").epochs) == (16, 50)
    assert published("brixel", "voc") == PROTOCOLS["brixel"]
    assert differences(published("brixel", "ade20k"), "ade20k", 256) == []


@pytest.mark.parametrize("name", ["dinov3-nyu", "normals"])
def test_nyu_is_seen_at_its_own_size_in_training_and_evaluation(name: str) -> None:
    protocol = PROTOCOLS[name]
    train, evaluate = (
        crops_of(config, [(480, 640)], [416, 544], 16, None) for config in (protocol.train, protocol.evaluate)
    )
    assert {(crop.scaled, crop.size) for crop in train} == {((480, 640), (416, 544))}
    assert [(crop.scaled, crop.size) for crop in evaluate] == [((480, 640), (480, 640))]


def test_a_change_shows_in_the_name() -> None:
    changed = with_overrides(published("jafar", "voc"), ["lr=2e-3", "train.flip=false"], "protocol jafar")
    assert printed_name(changed, "voc", 448) == "jafar (changed: train.flip=False, lr=0.002)"
    assert printed_name(PROTOCOLS["jafar"], "voc", 448) == "jafar"
    assert printed_name(PROTOCOLS["jafar"], "voc", 112) == "jafar (changed: size=112)"
    assert printed_name(PROTOCOLS["brixel-nyu"], "nyu", [288, 384]) == "brixel-nyu"
    assert printed_name(PROTOCOLS["quick"], "camvid", 112) == "quick"


@pytest.mark.parametrize(("name", "change", "message"), [
    ("quick", "lrr=1", "protocol quick has 1 error:\n  lrr: unknown key; did you mean lr?"),
    ("quick", "batch_size=0", "batch_size: expected greater than 0; found 0"),
    ("quick", "epochs=3", "give exactly one of protocol.steps and protocol.epochs"),
    ("quick", "gradient_weight=0.5", "protocol.points leaves no neighbours to compare: set protocol.gradient_weight=0"),
    ("jafar", "train.kind=slide", "protocol.train.kind slide is for evaluation only"),
    ("quick", "evaluate.scale=[1, 2]", "scale of whole images must be one scale, twice"),
    ("quick", "train.kind=random", "protocol.train.kind random needs protocol.train_labels"),
    ("jafar", "evaluate.flip=true", "protocol.evaluate must look at every image in one way: neither random nor flip"),
])  # fmt: skip
def test_an_errory_change_is_refused(name: str, change: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        with_overrides(PROTOCOLS[name], [change], f"protocol {name}")
    assert message in str(caught.value)


def test_the_rate_follows_the_schedule() -> None:
    cosine = with_overrides(PROTOCOLS["quick"], ["lr=1.0"], "quick")
    assert cosine.learning_rate(0, 100) == 1
    assert cosine.learning_rate(50, 100) == pytest.approx(0.5)
    assert cosine.learning_rate(25, 100) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    linear = with_overrides(PROTOCOLS["dinov3-ade"], ["lr=1.0", "warmup_steps=10"], "ade")
    assert [linear.learning_rate(step, 110) for step in (0, 4, 9, 10, 60)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5])
    assert linear.learning_rate(1, 20) == 1  # at most a tenth of the training is warm-up
    constant = PROTOCOLS["brixel"]
    assert constant.learning_rate(0, 9) == constant.learning_rate(8, 9) == 1e-3


def test_windows_overlap_at_any_size() -> None:
    ade = PROTOCOLS["dinov3-ade"]
    assert [ade.stride(size) for size in (512, 256, [256, 512])] == [341, 170, 170]
    assert PROTOCOLS["quick"].stride(112) is None


def test_epochs_become_steps() -> None:
    assert PROTOCOLS["jafar"].num_steps(100) == 1000
    assert PROTOCOLS["quick"].num_steps(5) == 1500
    assert PROTOCOLS["brixel"].num_steps(1) == 1  # 20 / 16
