from __future__ import annotations

import os
import pickle
import random
import re
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file, save_file

from brixel_cli.core.backbone import load_backbone
from brixel_cli.core.student import read_adapter
from brixel_cli.core.weights import check_keys, import_released, load_pth, load_tensors, save_tensors
from brixel_cli.errors import WeightsError

RELEASED = FIXTURES / "official_layout_tiny.pth"
CASES = load_file(FIXTURES / "official_layout_tiny_io.safetensors")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return load_pth(RELEASED)


@pytest.mark.parametrize("case", sorted({key.split(".")[0] for key in CASES}))
@torch.no_grad()
def test_the_golden_case_of_the_released_layout(case: str) -> None:
    adapter = read_adapter(str(RELEASED)).build().eval()
    output = adapter(CASES[f"{case}.image"], [CASES[f"{case}.layer{number}"] for number in range(4)])
    expected = CASES[f"{case}.expected"]
    assert output.shape == expected.shape
    assert (output - expected).abs().max() < 1e-4
    assert expected.abs().mean() > 0.1


def test_the_import_says_what_it_skipped(state: dict[str, torch.Tensor]) -> None:
    released = import_released(state)
    assert len(state) == 213
    assert released.embed_dim == 64
    # 30 whole tensors, and two of the three rows of the level embedding.
    assert len(released.skipped) == 31
    assert len(released.tensors) + 30 == 213
    trained = sum(
        t.numel() for k, t in state.items() if not k.endswith(("running_mean", "running_var", "batches_tracked"))
    )
    assert released.num_live_parameters + released.num_skipped_parameters == trained
    assert re.search(
        r"183 tensors taken \(323,488 parameters\); 31 skipped that never reach the output", released.summary
    )
    assert "adapter.guide_proj" in released.summary
    assert "adapter.spm.conv3" in released.summary


def test_a_missing_an_unknown_and_a_misshapen_key_are_named_together(state: dict[str, torch.Tensor]) -> None:
    del state["head.mix.bias"]
    state["adapter.surprise"] = torch.zeros(1)
    state["adapter.spm.fc1.bias"] = torch.zeros(65)
    with pytest.raises(WeightsError) as fault:
        import_released(state, "mine.pth")
    message = str(fault.value)
    assert "mine.pth does not fit the released layout: 3 of its keys are wrong" in message
    assert "missing: head.mix.bias" in message
    assert "unknown: adapter.surprise" in message
    assert "misshapen: adapter.spm.fc1.bias is (65,), expected (64,)" in message


def test_something_else_is_no_released_checkpoint() -> None:
    with pytest.raises(WeightsError, match=r"no released BRIXEL checkpoint: it has no key adapter.level_embed"):
        import_released({"weight": torch.zeros(3)})


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, ("trap-was-sprung", "w"))  # type: ignore[return-value]


def test_loading_never_unpickles_arbitrary_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1), "trap": Trap()}, "bad.pth")
    with pytest.raises(WeightsError, match=r"bad.pth is no state dict of plain tensors"):
        load_pth(Path("bad.pth"))
    Path("worse.pth").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(WeightsError, match="worse.pth is no state dict"):
        load_pth(Path("worse.pth"))
    assert not Path("trap-was-sprung").exists()


def test_a_nested_or_missing_pth_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "nested.pth")
    with pytest.raises(WeightsError, match="no flat state dict of tensors"):
        load_pth(tmp_path / "nested.pth")
    with pytest.raises(WeightsError, match="absent.pth cannot be read"):
        load_pth(tmp_path / "absent.pth")


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.tensor(4)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"note": "n"})
    loaded, metadata = load_tensors(tmp_path / "x.safetensors")
    assert metadata == {"note": "n"}
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.randn(3, 2),
        "b": torch.tensor(4),
        "c": torch.ones(3, dtype=torch.bfloat16),
        "d": torch.ones(0),
    }
    save_tensors(path, tensors, {"facts": '{"step": 12}', "ä": "\x1b\n"})
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    blanks = length - len(whole[:length].rstrip())  # they fill up the header, and mean nothing
    assert blanks < 8
    for at in {*range(len(whole))} - {*range(length - blanks, length)}:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            loaded, metadata = load_tensors(path)
        except WeightsError:
            continue
        assert metadata == {"facts": '{"step": 12}', "ä": "\x1b\n"}  # the name of the checksum
        assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())
    path.write_bytes(whole)
    assert load_tensors(path)[1]["facts"] == '{"step": 12}'


def test_the_same_values_give_the_same_bytes(tmp_path: Path) -> None:
    metadata = {f"key {number}": "ü" * number for number in range(9)}
    written = set()
    for number in range(8):
        save_tensors(tmp_path / f"{number}.safetensors", {"a": torch.ones(3)}, metadata)
        written.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(written) == 1


def test_a_file_of_earlier_versions_has_no_checksum(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", {"note": "n"})
    assert load_tensors(tmp_path / "x.safetensors")[1] == {"note": "n"}


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(1)}, {})

    def cut_short(tensors: object, partial: Path, metadata: object) -> None:
        partial.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr("brixel_cli.core.weights.save_file", cut_short)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(path, {"a": torch.ones(1)}, {})
    assert load_tensors(path)[0]["a"].item() == 0


def test_a_damaged_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(WeightsError, match=r"x.safetensors cannot be read as safetensors"):
        load_tensors(tmp_path / "x.safetensors")


def test_many_wrong_keys_are_counted(tmp_path: Path) -> None:
    save_file({f"k{number}": torch.zeros(1) for number in range(30)}, tmp_path / "x.safetensors")
    found, _ = load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="and 10 more"):
        check_keys({}, found, "x")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_has_the_rights_that_the_user_asks_for(tmp_path: Path, mask: int) -> None:
    tmp_path.chmod(0o1777)  # a folder that everybody may write to, such as /tmp
    before = os.umask(mask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_damaged_pth_is_named_without_advice_to_trust_it(tmp_path: Path) -> None:
    path = tmp_path / "state.pth"
    torch.save({"weight": torch.arange(16.0)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + whole[300:])  # the first part would begin 200 bytes before the file
    with pytest.raises(WeightsError, match=r"state.pth is damaged: .* Put a copy that is whole in its place\."):
        load_pth(path)
    rng = random.Random(0)
    refused: list[str] = []
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.randint(0, len(damaged))] if rng.random() < 0.3 else damaged)
        try:
            load_pth(path)
        except WeightsError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(str(path) in message and "weights_only" not in message for message in refused)


@pytest.mark.parametrize(
    "state",
    [{7: torch.ones(1)}, {"a": torch.ones(2, 2).to_sparse()}, {"a": torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)}],
    ids=["number", "sparse", "quantised"],
)  # fmt: skip
def test_a_state_dict_of_other_things_is_refused(tmp_path: Path, state: dict[object, torch.Tensor]) -> None:
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"odd.pth is no"):
        load_pth(tmp_path / "odd.pth")


def test_a_damaged_released_checkpoint_is_named(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    rng = random.Random(1)
    for number in range(40):
        odd = dict(state)
        for key in rng.sample(sorted(state), 3):
            odd[key] = rng.choice([torch.ones(()), torch.ones(0), torch.ones(3, 0), torch.ones(1, 1, 1)])
        if number % 4 == 0:
            odd["adapter.level_embed"] = torch.ones(3, 0)
        with pytest.raises(WeightsError, match="odd.pth"):
            import_released(odd, "odd.pth")


@pytest.mark.parametrize("reader", ["load_pth", "backbone"])
def test_a_flipped_bit_in_a_pth_is_noticed(reader: str, tmp_path: Path) -> None:
    state = load_backbone("test_vit", "random").vit.state_dict()
    path = tmp_path / "vit.pth"
    torch.save(state, path)
    read = load_pth if reader == "load_pth" else lambda path: load_backbone("test_vit", str(path))
    read(path)
    whole = path.read_bytes()
    largest = max(state.values(), key=lambda tensor: tensor.numel()).numpy().tobytes()
    place = whole.index(largest) + len(largest) // 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    torch.load(path, weights_only=True)  # torch itself takes it
    with pytest.raises(WeightsError, match=r"vit.pth is damaged: .* Put a copy that is whole in its place\."):
        read(path)


def test_a_pth_without_checksums_is_taken(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "new.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("new", "old"):
        assert torch.equal(load_pth(tmp_path / f"{name}.pth")["a"], torch.ones(3))
