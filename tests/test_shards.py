"""One set of images in several shards: who takes what, by numbers alone, and files that are complete or not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import pytest
from conftest import TWO_RANKS, Listener, every_row, make_photograph
from printed_json import checked
from typer.testing import CliRunner

import brixel_cli
from brixel_cli.app import app
from brixel_cli.config.shard import Shard, parse_shard
from brixel_cli.core.student import read_adapter, save_student
from brixel_cli.data.row_store import MISSING, STATUS, Store
from brixel_cli.engines.extracting import extraction, parts
from brixel_cli.engines.extracting.extraction import extract
from brixel_cli.engines.extracting.parts import asked_words, completed
from brixel_cli.errors import BrixelError, UsageError


def slurm(number: int, count: int, least: int = 0, step: int = 1) -> dict[str, str]:
    """What Slurm sets in a task of an array."""
    values = {"ID": number, "COUNT": count, "MIN": least, "MAX": least + (count - 1) * step, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def torchrun(rank: int, count: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("3/64", {}, (3, 64)),
        ("3/64", torchrun(1, 2), (3, 64)),  # the processes share this shard
        ("auto", slurm(0, 64), (1, 64)),
        ("auto", slurm(64, 64, least=1), (64, 64)),  # --array=1-64
        ("auto", slurm(9, 3, least=5, step=4), (2, 3)),  # --array=5-13:4
        ("auto", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "8"}, (8, 8)),
        ("auto", torchrun(2, 8), (3, 8)),
        ("auto", slurm(3, 4, least=1) | torchrun(1, 8), (18, 32)),  # two tasks of eight before it, and one process
    ],
)
def test_a_shard_is_known_from_its_numbers(text: str, environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert parse_shard(text, environment) == Shard(*expected)


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("0/4", {}, "--shard 0/4: there is no such shard"),
        ("5/4", {}, "--shard 5/4: there is no such shard"),
        ("1/100001", {}, "--shard 1/100001: there is no such shard"),
        ("3 of 4", {}, "--shard 3 of 4 is not understood.*3/64. Or auto"),
        ("auto", {}, "--shard auto: neither a Slurm array .* nor torchrun"),
        ("auto", slurm(3, 2, least=3) | {"SLURM_ARRAY_TASK_MAX": "7"}, "2 from 3 to 7, have gaps"),  # --array=3,7
        ("auto", slurm(1, 4) | {"SLURM_ARRAY_TASK_COUNT": "many"}, "SLURM_ARRAY_TASK_COUNT is many, not a number"),
        ("auto", {"RANK": "1"}, "WORLD_SIZE is not set, not a number"),
        ("auto", torchrun(2, 2), "--shard 3/2: there is no such shard"),
    ],
)
def test_a_shard_that_cannot_be_is_refused(text: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_shard(text, environment)


@pytest.mark.parametrize("failing", [False, True])
def test_a_python_caller_keeps_its_group(model, photographs: Path, tmp_path: Path, monkeypatch, failing: bool) -> None:
    for name, value in torchrun(1, 2).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    chosen = {"res": 64, "checkpoint": model[0], "device": "cpu", "output": tmp_path / "out.h5", "shard": "auto"}
    if failing:
        with pytest.raises(UsageError, match="Nothing at"):
            brixel_cli.extract(tmp_path / "none", **chosen)
    else:
        features = brixel_cli.extract(photographs, **chosen)
        assert features.paths == ["4.png", "5.png", "6.png", "7.png"]
    assert {name: os.environ.get(name) for name in before} == before


def test_all_shards_together_are_everything_in_order() -> None:
    # 10 entries in 4: the bounds are 0, 10 // 4, 20 // 4, 30 // 4, 10.
    assert [list(Shard(n, 4).take(range(10))) for n in (1, 2, 3, 4)] == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    assert [len(Shard(n, 3).take(range(3))) for n in (1, 2, 3)] == [1, 1, 1]
    with pytest.raises(UsageError, match="--shard 1/4: 3 inputs cannot be split into 4 shards. Give 3 shards at most"):
        Shard(1, 4).take(range(3))


def test_parts_have_names_that_sort(tmp_path: Path) -> None:
    assert Shard(3, 64).path(tmp_path / "out.h5") == tmp_path / "out.00003-of-00064.h5"
    assert Shard(3, 64).path(tmp_path / "v1.5") == tmp_path / "v1.5.00003-of-00064.h5"


def test_the_shards_of_a_folder_are_the_rows_of_one_process(extract_options, mixed: Path, listener: Listener) -> None:
    (mixed / "04b.png").write_text("no image")
    whole = every_row(extract(extract_options(inputs=[str(mixed)], batch_size=1), listener).output)
    rows: dict[str, bytes] = {}
    for number in (2, 3, 1):
        options = extract_options(inputs=[str(mixed)], batch_size=1, shard=Shard(number, 3))
        done = extract(options, listener)
        assert done.output == options.output.with_name(f"out.0000{number}-of-00003.h5")
        assert len(done.failures) == (number == 2)
        rows |= every_row(done.output)
    assert rows == whole
    assert sorted(path.name for path in done.output.parent.glob("out*")) == [
        "out.00001-of-00003.h5", "out.00002-of-00003.h5", "out.00003-of-00003.h5", "out.h5",
    ]  # fmt: skip


def test_a_part_has_its_name_only_when_it_is_complete(
    extract_options, photographs: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = extract_options(batch_size=1, shard=Shard(2, 2))
    part = options.output.with_name("out.00002-of-00002.h5")
    whole = every_row(extract(replace(options, output=options.output.with_name("whole.h5")), listener).output)
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        extract(options, listener)
    monkeypatch.undo()
    unfinished = part.with_name(f"{part.name}.unfinished")
    assert not part.exists()
    before = int((Store(unfinished).status != MISSING).sum())
    assert 1 <= before < 4
    done = extract(options, listener)
    assert (done.num_before, done.num_computed) == (before, 4 - before)
    assert not unfinished.exists()
    assert every_row(part) == whole


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End an extraction as Ctrl-C does, after some images."""
    load, seen = extraction._load, []

    def failing(plan, row):
        seen.append(row)
        if len(seen) > count:
            raise KeyboardInterrupt
        return load(plan, row)

    monkeypatch.setattr(extraction, "_load", failing)


def test_a_complete_part_is_passed_over_without_torch(model, photographs: Path, tmp_path: Path) -> None:
    command = ["extract", "--input", str(photographs), "--res", "64", "--checkpoint", model[0], "--device", "cpu",
               "--output", str(tmp_path / "out.h5"), "--shard", "1/2", "--json"]  # fmt: skip
    code = (
        "import sys; from brixel_cli.app import app; app(standalone_mode=False); "
        "print(sorted({'torch', 'timm', 'PIL.Image'} & set(sys.modules)))"
    )
    assert CliRunner().invoke(app, command).exit_code == 0
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    result, loaded = done.stdout.splitlines()
    assert json.loads(result)["before"] == 4
    assert json.loads(result)["computed"] == 0
    assert "torch" not in loaded
    assert "timm" not in loaded
    assert done.stderr.startswith(f"{tmp_path / 'out.00001-of-00002.h5'} is complete\n")


def test_a_complete_part_of_another_student_or_version_is_looked_at(
    extract_options, listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = extract_options(shard=Shard(1, 2))
    folder = Path(shutil.copytree(options.checkpoint, tmp_path / "student"))
    options = replace(options, checkpoint=str(folder))
    extract(options, listener)
    assert completed(options) is not None
    with monkeypatch.context() as patch:
        patch.setattr(parts, "library_versions", lambda: {"torch": "99"})
        assert completed(options) is None
    with monkeypatch.context() as patch:  # a later version of brixel comes with other students
        patch.setattr(parts, "shipped_students", lambda: {"other": "0" * 64})
        assert completed(options) is None
    stored = read_adapter(str(folder))
    changed = {key: tensor + 1 for key, tensor in stored.tensors.items()}
    save_student(folder / "student.safetensors", changed, stored.card)
    with pytest.raises(UsageError, match=r"00001-of-00002.h5 was begun with something else.*\n.*student.sha256: "):
        extract(options, listener)


def test_a_complete_part_keeps_telling_of_its_failures(model, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    make_photograph(folder / "a.png", 0)
    (folder / "b.png").write_text("no image")
    command = ["extract", "--input", str(folder), "--res", "64", "--checkpoint", model[0], "--device", "cpu",
               "--output", str(tmp_path / "out.h5"), "--shard", "2/2"]  # fmt: skip
    first, again = (CliRunner().invoke(app, command) for _ in range(2))
    assert first.exit_code == again.exit_code == 1
    assert "1 of 1 images failed" in first.stderr
    assert first.stderr.splitlines()[-1] == again.stderr.splitlines()[-1]


def test_a_part_that_was_asked_for_otherwise_is_looked_at_and_refused(extract_options, listener: Listener) -> None:
    extract(extract_options(shard=Shard(1, 2)), listener)
    with pytest.raises(UsageError, match=r"00001-of-00002.h5 was begun with something else.*\n.*--res: 64 -> 96"):
        extract(extract_options(shard=Shard(1, 2), res=96), listener)
    with pytest.raises(UsageError, match="is of a split in 2 shards. Give that number, name another --output"):
        extract(extract_options(shard=Shard(1, 4)), listener)


def test_an_image_that_came_between_the_shards_is_noticed(extract_options, mixed: Path, listener: Listener) -> None:
    options = extract_options(inputs=[str(mixed)], shard=Shard(1, 2))
    splits = []
    for name in ("20.png", "21.png"):  # 11 images, then 12: the first shard has the same 5, then one more
        make_photograph(mixed / name, 1)
        done = extract(replace(options, output=options.output.with_name(f"{name}.h5")), listener)
        splits.append(brixel_cli.FeatureFile(done.output).description["shard"])
    assert [split["num_inputs"] for split in splits] == [11, 12]
    assert splits[0]["sha256"] != splits[1]["sha256"]


def test_a_damaged_row_of_a_complete_part_is_computed_again(extract_options, listener: Listener) -> None:
    options = extract_options(shard=Shard(1, 2))
    path = extract(options, listener).output
    before = path.read_bytes()
    Store(path, writable=[STATUS]).mark(2, MISSING)
    assert extract(options, listener).num_computed == 1
    assert path.read_bytes() == before


def test_a_part_is_begun_anew_where_that_is_asked_for(extract_options, listener: Listener) -> None:
    extract(extract_options(shard=Shard(1, 2)), listener)
    done = extract(extract_options(shard=Shard(1, 2), res=96, overwrite=True), listener)
    assert done.num_computed == 4
    assert brixel_cli.FeatureFile(done.output).description["res"] == 96


def test_the_words_of_a_part_ask_for_its_rows_and_hold_no_secrets(extract_options, tmp_path: Path) -> None:
    options = extract_options(
        inputs=["s3://key:secret@bucket/a.tar?X-Amz-Signature=abc", str(tmp_path)],
        strict=True,
        workers=3,
        checkpoint="name",
    )
    assert asked_words(replace(options, shard=Shard(1, 2))) == [
        "--input", "s3://bucket/a.tar", "--input", str(tmp_path), "--res", "64", "--checkpoint", "name",
        "--precision", "float32",
    ]  # fmt: skip


@pytest.mark.parametrize("changes", [{"pca": 4}, {"preview": True}, {"page": Path("a.html")}, {"storage": "npy"}])
def test_what_takes_the_whole_set_is_refused(extract_options, changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="--shard"):
        extract_options(shard=Shard(1, 2), **changes)


def test_every_process_of_torchrun_has_a_shard_and_waits_for_nobody(model, photographs: Path, tmp_path: Path) -> None:
    command = ["brixel_cli", "extract", "--input", str(photographs), "--res", "64", "--checkpoint", model[0], "--device",
               "cpu", "--output", str(tmp_path / "out.h5"), "--shard", "auto"]  # fmt: skip
    done = subprocess.run([sys.executable, *TWO_RANKS, "-m", *command], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts = [tmp_path / f"out.0000{number}-of-00002.h5" for number in (1, 2)]
    names = []
    for part in parts:
        with h5py.File(part) as file:
            names += list(file["paths"].asstr()[:])
    assert names == [f"{number}.png" for number in range(8)]


def test_a_dry_run_is_of_the_shard_alone(extract_options, model, photographs: Path, tmp_path: Path) -> None:
    command = ["extract", "--input", str(photographs), "--res", "64", "--checkpoint", model[0], "--device", "cpu",
               "--output", str(tmp_path / "out.h5"), "--shard", "2/4", "--dry-run", "--json"]  # fmt: skip
    plan = checked("extract-dry-run", CliRunner().invoke(app, command).stdout)
    assert plan["images"] == 2
    assert plan["shard"]["number"] == 2
    assert plan["shard"]["num_inputs"] == 8
    assert plan["output"].endswith("out.00002-of-00004.h5")
    assert not list(tmp_path.glob("out*"))


def test_a_part_that_cannot_be_renamed_is_reported(
    extract_options, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = extract_options(shard=Shard(1, 2))
    part = options.output.with_name("out.00001-of-00002.h5")
    replaced = os.replace

    def refused(old, new):
        if Path(new) == part:
            raise PermissionError(13, "Permission denied")
        replaced(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refused)
        with pytest.raises(BrixelError, match=r"out.00001-of-00002.h5 cannot be written"):
            extract(options, listener)
    assert extract(options, listener).num_before == 4


def test_the_slurm_script_of_the_documentation_computes_all_shards(model, photographs: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "CLUSTER.md").read_text(encoding="utf-8")
    script = page.partition("```bash\n")[2].partition("```")[0]
    assert script.startswith("#!/bin/bash\n#SBATCH")
    program = tmp_path / "bin" / "brixel"
    program.parent.mkdir()
    options = f"--checkpoint {model[0]} --device cpu --res 64"  # those of the last kind win
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m brixel_cli "$@" {options}\n')
    program.chmod(0o755)
    (tmp_path / "photos").symlink_to(photographs)
    for number in (1, 2):
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, **slurm(number, 2, least=1), "PATH": f"{program.parent}:{os.environ['PATH']}"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "photos.00001-of-00002.h5", "photos.00002-of-00002.h5",
    ]  # fmt: skip
