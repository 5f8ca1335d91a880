"""Cases of files that brixel itself has written, and of weights."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from conftest import FIXTURES

from brixel_cli import FeatureFile
from hostile import damage, sandbox
from hostile.cases import Case, Check, holds_the_same
from hostile.world import FORMATS, World, contents_of_features, copy, pictures_of

# Feature files


def feature_file(world: World, rng: Random, place: Path) -> Case:
    """An output of extract, finished or interrupted, continued or begun anew."""
    kind = rng.choice(tuple(FORMATS))
    state = rng.choice(("whole", "cut"))
    output = copy(getattr(world, state)[kind], place / "work" / FORMATS[kind][0])
    target = output if output.is_file() else damage.one_of(rng, output) if rng.random() < 0.4 else output / "index.h5"
    what = f"{kind}, {state}, {damage.damage(rng, target)}"
    command = world.command(kind, output)
    same = holds_the_same(world, kind, output)

    def check() -> str | None:
        """A map that has changed in a finished output is found by --verify, and then computed again."""
        if state == "cut" or same() is None:
            return same()
        verified = sandbox.run(["extract", "--verify", str(output)], place)
        again = sandbox.run(command, place)
        return same() if (verified.code, again.code) == (1, 0) else f"--verify, and again: {verified}, {again}"

    anew = ["--overwrite"] if rng.random() < 0.25 else []
    return Case(" ".join([what, *anew]), [*command, *anew], same if anew else check, output=(f"work/{output.name}",))


def feature_reader(world: World, rng: Random, place: Path) -> Case:
    """An output of extract, read by FeatureFile: what it reads is right, or --verify names the damage."""
    kind = rng.choice(tuple(FORMATS))
    output = copy(world.whole[kind], place / "work" / FORMATS[kind][0])
    target = output if output.is_file() else damage.one_of(rng, output) if rng.random() < 0.4 else output / "index.h5"
    what = f"{kind}, {damage.damage(rng, target)}"
    expected: Mapping[str, str] = world.expected[kind]["maps"]

    return Case(what, lambda: _read(output), _noticed(output, output, expected, place), output=("verified",))


def _read(output: Path) -> None:
    features = FeatureFile(output)
    _ = features.failures, features.pca, features.single_files, features.description, len(features)
    for row in features.rows:
        _ = features[row], features.paths[row] in features


def _noticed(output: Path, whole: Path, expected: Mapping[str, str], place: Path) -> Check:
    """Whether an output reads as the undamaged one, or --verify ends with 1, on a copy of all that belongs to it."""

    def check() -> str | None:
        found = contents_of_features(output)
        same = all(expected.get(name) == digest for name, digest in found["maps"].items())
        if same and found["num_images"] == len(expected):
            return None
        looked_at = copy(whole, place / "verified" / whole.name)  # --verify marks what is damaged
        if whole != output:
            looked_at = looked_at / output.relative_to(whole)
        ended = sandbox.run(["extract", "--verify", str(looked_at)], place)
        says = f"it reads other maps, and --verify ends with {ended.code}: {ended.err[-200:]}"
        return None if ended.code == 1 else says

    return check


def parts_of_a_file(world: World, rng: Random, place: Path) -> Case:
    """Parts to be joined, or that were joined, of which one is damaged, missing, or another."""
    folder, expected = copy(world.parts, place / "work" / "parts"), world.expected["h5"]["maps"]
    first, second = sorted(folder.glob("out.*.h5"))
    target, joined = rng.choice((first, second)), folder / "all.h5"
    how = rng.choice(("damage", "damage", "damage", "swapped", "twice", "unfinished", "other"))
    if how == "damage":
        how = damage.damage(rng, rng.choice((target, target, joined)))
    elif how == "swapped":
        data = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
    elif how == "twice":
        copy(first, folder / "two.00001-of-00002.h5")
    elif how == "unfinished":
        target.rename(f"{target}.unfinished")
    else:
        shutil.copy(world.whole["int8"], target)
    if rng.random() < 0.4:
        what = f"joined before, {target.name}: {how}"
        return Case(what, lambda: _read(joined), _noticed(joined, folder, expected, place), output=("verified",))
    output = folder / "new.h5"
    copied = ["--copy"] if rng.random() < 0.5 else []
    arguments = ["extract", "--join", str(folder / "out.*.h5"), "--output", str(output), *copied]
    check = _noticed(output, folder, expected, place)
    return Case(f"{target.name}: {how} {copied}", arguments, check, output=("work/parts/new.h5", "verified"))


# Runs, probes, heads


def run_folder(world: World, rng: Random, place: Path) -> Case:
    state = rng.choice(("whole", "cut", "cut"))
    output = copy(getattr(world, state)["run"], place / "work" / "out")
    target = damage.one_of(rng, output)
    if rng.random() < 0.5:
        target = output / rng.choice(("state.safetensors", "recipe.yaml", "metrics.jsonl"))
    what = f"{state}, {damage.damage(rng, target)}"
    # Lines that are whole are believed, and what a warning names is no secret.
    without = ("metrics",) if target.suffix == ".jsonl" else ()
    return Case(what, world.command("run", output), holds_the_same(world, "run", output, without), noticed=True)


def probe_folder(world: World, rng: Random, place: Path) -> Case:
    state = rng.choice(("whole", "cut"))
    output = copy(getattr(world, state)["probe"], place / "work" / "out")
    target = output / "results.json" if rng.random() < 0.3 else damage.one_of(rng, output)
    what = f"{state}, {damage.damage(rng, target)}"
    # The figures of a table that is whole are believed.
    without = {"results.json": ("runs", "summary"), "curves": ("curves",), "images": ("images",)}
    parts = without.get(target.name, without.get(target.parent.name, ()))
    return Case(what, world.command("probe", output), holds_the_same(world, "probe", output, parts), noticed=True)


def saved_head(world: World, rng: Random, place: Path) -> Case:
    head = copy(world.whole["probe"] / world.head, place / "work" / "head.safetensors")
    how = rng.choice(damage.SAFETENSORS)
    what = how(rng, head)
    crafted = how in (damage.safetensors_metadata, damage.safetensors_tensor, damage.safetensors_header)
    output = place / "work" / "out"
    return Case(what, ["probe", "--apply", str(head), "--input", str(world.photos), "--output", str(output), "--device", "cpu"],
                None if crafted else lambda: None if pictures_of(output) == world.expected["apply"] else "other predictions")  # fmt: skip


# Weights


def student_file(world: World, rng: Random, place: Path) -> Case:
    """A student as safetensors, or the weights of its backbone, which have no checksum."""
    checkpoint, vit = copy(world.model, place / "work" / "model"), world.vit
    target = checkpoint / "student.safetensors"
    if rng.random() < 0.3:
        target = checkpoint / "vit.safetensors"
        vit = str(target)
    how = rng.choice(damage.SAFETENSORS)
    what = f"{target.name}: {how(rng, target)}"
    crafted = how in (damage.safetensors_metadata, damage.safetensors_tensor, damage.safetensors_header)
    crafted = crafted or target.name.startswith("vit")
    output = place / "work" / "out.h5"
    arguments = world.command("h5", output)
    arguments[arguments.index("--checkpoint") + 1] = str(checkpoint)
    return Case(what, [*arguments, "--backbone-weights", vit], None if crafted else holds_the_same(world, "h5", output),
                output=("work/out.h5",))  # fmt: skip


class _Runs:
    def __init__(self, call: Callable[..., Any], *arguments: Any):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


def released_checkpoint(world: World, rng: Random, place: Path) -> Case:
    """A .pth of the authors' layout; some hold code that would write a file."""
    path = copy(FIXTURES / "official_layout_tiny.pth", place / "work" / "x.pth")
    canary = place / "outside" / "canary"
    how = rng.choice(("bytes", "bytes", "bytes", "head", "code", "pickle", "zip", "members", "bomb"))
    check: Check | None = None
    output = place / "work" / "out.h5"
    if how in ("bytes", "head"):
        what = damage.any_bytes(rng, path) if how == "bytes" else damage.in_head(rng, path)
        check = lambda: None if contents_of_features(output) == world.expected["pth"] else "other maps"  # noqa: E731
    elif how == "code":
        call = rng.choice((os.system, os.mkdir, eval, exec))
        text = (
            f"touch {canary}"
            if call is os.system
            else str(canary)
            if call is os.mkdir
            else f"open({str(canary)!r}, 'w')"
        )
        value = _Runs(call, text)
        if rng.random() < 0.5:
            with zipfile.ZipFile(path) as old:
                members = {name: old.read(name) for name in old.namelist()}
            name = next(name for name in members if name.endswith("data.pkl"))
            with zipfile.ZipFile(path, "w") as new:
                for member, data in members.items():
                    new.writestr(member, pickle.dumps(value, 2) if member == name else data)
        else:
            path.write_bytes(pickle.dumps(value, rng.choice((2, 4))))
        what = f"calls {call.__name__}"
    elif how == "pickle":
        value = rng.choice(damage.ODD_VALUES)
        path.write_bytes(pickle.dumps(rng.choice((value, {"a": value}, [value] * 3)), rng.choice((0, 2, 4))))
        what = f"a pickle of {value!r}"[:80]
    elif how == "zip":
        with zipfile.ZipFile(path, "w") as new:
            new.writestr(rng.choice(("x/data.pkl", "../../outside/precious.txt", "data.pkl")), rng.randbytes(50))
        what = "another archive"
    elif how == "members":
        with zipfile.ZipFile(path) as old:
            members = {name: old.read(name) for name in old.namelist()}
        name = rng.choice(sorted(members))
        with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as new:
            for member, data in members.items():
                if member != name or rng.random() < 0.5:
                    new.writestr(member, rng.randbytes(len(data) // 2) if member == name else data)
        what = f"member {name} is another"
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            new.writestr("x/data.pkl", bytes(200_000_000))
        what = "200 MB of zeros in a few bytes"
    arguments = world.command("h5", output)
    arguments[arguments.index("--checkpoint") + 1] = str(path)
    return Case(
        what, [*arguments, "--backbone", "test_vit", "--backbone-weights", world.vit], check, output=("work/out.h5",)
    )
