"""Cases of what users give: recipes, images, labels, lists, names, options, and disks that are full."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from hostile import damage
from hostile.cases import FORGED, Case, Check, holds_the_same
from hostile.sandbox import GIB, Limits
from hostile.world import FORMATS, World, contents_of_features, copy

# Recipes

SCALARS = ("1" * 5000, "1e400", "-1e400", "1" + "0" * 400, "!!binary aGk=", "!!set {a, b}", "!!timestamp 2001-01-01", "!!python/object/apply:os.system [id]",
           "2001-01-01", ".inf", ".nan", "0x10", "010", "1_000", "~", "yes", "", "[" * 3000, "{" * 3000, "'", '"\\x', "&a *a", "*b", "[&a [*a]]", "|\n  x",
           "99999999999999999999", "-1", "0", "1.5", "1e9", "1000000000", "[]", "{}", "[1, 2, 3]", "[1000000, 1000000]", "\x00", "\x1b[2J", "\ud7ff",
           "'../../outside/precious.txt'", "/dev/zero", "''", "!!str 4", "? a", "- a", "<<: *x", "%YAML 9.9")  # fmt: skip


def recipe_file(world: World, rng: Random, place: Path) -> Case:
    """A recipe of distill or probe, looked at by --dry-run."""
    path = place / "work" / "r.yaml"
    probing = rng.random() < 0.35
    text = (world.probe_recipe if probing else world.recipe).read_text()
    how = rng.choice(("value", "value", "value", "bytes", "lines", "whole", "override"))
    override: list[str] = []
    if how in ("value", "override"):
        scalar = rng.choice(SCALARS)
        lines = text.splitlines()
        at = rng.choice([number for number, line in enumerate(lines) if ":" in line])
        keys = [place for place, letter in enumerate(lines[at]) if letter == ":"]
        end = rng.choice(keys)
        rest = lines[at][end + 1 :]
        stop = next((number for number, letter in enumerate(rest) if letter in ",}"), len(rest))
        what = f"line {at}: {lines[at][:end][-30:]}: {scalar[:40]!r}"
        if how == "value":
            lines[at] = f"{lines[at][: end + 1]} {scalar}{rest[stop:]}"
        else:
            key = rng.choice(("seed", "optim.steps", "views.teacher_size", "run.workers", "data.images", "data.root", "size", "protocol.steps",
                              "adapter.fusion.width", "name", "optim.lr", "data", "loss.spectral.weight", "run.device"))  # fmt: skip
            what = f"--set {key}={scalar[:40]!r}"
            override = ["--set", f"{key}={scalar}".replace("\0", "")]
        text = "\n".join(lines)
    elif how == "whole":
        bombs = {
            "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
            "itself": "&a {name: *a}", "deep": "".join(" " * n + "a:\n" for n in range(3000)), "brackets": "[" * 100_000,
            "documents": text + "\n---\n" + text, "merge": "x: &x {a: 1}\n<<: *x\n" + text, "list": "- a\n- b", "text": "hello", "empty": "",
            "keys": "? [a, b]\n: 1", "tag": "!!python/object/new:os.system [id]", "tabs": text.replace(" ", "\t"), "long": "a: " + "x" * 3_000_000,
            "many": "\n".join(f"k{n}: 1" for n in range(20000)), "utf16": text,
        }  # fmt: skip
        what = rng.choice(sorted(bombs))
        text = bombs[what]
    path.write_bytes(text.encode("utf-16" if how == "whole" and what == "utf16" else "utf-8", "surrogatepass"))
    if how == "bytes":
        what = damage.any_bytes(rng, path)
    elif how == "lines":
        what = damage.text_lines(rng, path)
    command = ["probe", "--checkpoint", str(world.model), "--device", "cpu"] if probing else ["distill"]
    return Case(what, [*command, "--recipe", str(path), *override, "--dry-run"], output=())


# Images, lists, names


def _good(world: World, folder: Path) -> Check:
    """Whether the good images of a folder have the features that they have alone."""
    output = folder.parent / "out.h5"

    def check() -> str | None:
        if not output.exists():
            return None
        maps = contents_of_features(output)["maps"]
        wrong = [
            name
            for name, digest in maps.items()
            if Path(name).name in world.alone and digest != world.alone[Path(name).name]
        ]
        return f"other maps of {', '.join(wrong)}" if wrong else None

    return check


def _distil_alone(world: World, folder: Path, output: Path) -> list[str]:
    return ["distill", "--recipe", str(world.recipe), "--images", str(folder), "--output", str(output),
            "--set", "optim.steps=2"]  # fmt: skip


def _predict_alone(world: World, folder: Path, output: Path) -> list[str]:
    head = world.whole["probe"] / world.head
    return ["probe", "--apply", str(head), "--input", str(folder), "--output", str(output), "--device", "cpu"]


def extract_alone(world: World, reference: Path, output: Path, *more: str) -> list[str]:
    arguments = world.command("h5", output)
    arguments[arguments.index("--input") + 1] = str(reference)
    arguments[arguments.index("--batch-size") + 1] = "1"
    return [*arguments, *more]


IMAGE_FORMATS = {"png": {}, "jpg": {}, "gif": {}, "tif": {"compression": "tiff_lzw"}, "webp": {}, "bmp": {}, "ppm": {}, "jp2": {}, "tga": {},
                 "pcx": {}, "ico": {}, "dds": {}, "sgi": {}, "avif": {}}  # fmt: skip


def image(world: World, rng: Random, place: Path) -> Case:
    """Damaged images among good ones, in extract, distill or probe --apply."""
    folder = place / "work" / "images"
    folder.mkdir()
    for name in list(world.alone)[:2] if rng.random() < 0.5 else world.alone:
        shutil.copy(world.photos / name, folder / name)
    did = [_bad_image(world, rng, folder, number) for number in range(3)]
    if rng.random() < 0.7:
        arguments = extract_alone(
            world, folder, place / "work" / "out.h5", *(["--preview"] if rng.random() < 0.2 else [])
        )
        return Case("; ".join(did), arguments, always=_good(world, folder), output=("work/out.h5", "work/out_preview"))
    output = place / "work" / "out"
    arguments = _distil_alone(world, folder, output) if rng.random() < 0.5 else _predict_alone(world, folder, output)
    return Case("; ".join([arguments[0], *did]), arguments)


def _bad_image(world: World, rng: Random, folder: Path, number: int) -> str:
    how = rng.choice(("bytes", "bytes", "bytes", "bytes", "exif", "eps", "huge", "odd", "mode"))
    extension = rng.choice(sorted(IMAGE_FORMATS))
    path = folder / f"bad_{number}.{extension}"
    picture = Image.open(world.photos / "0.png").convert("RGB")
    if how == "mode":
        mode = rng.choice(("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F", "LAB", "YCbCr", "HSV"))
        try:
            picture.convert("L" if mode == "I;16" else mode).convert(mode).save(path := path.with_suffix(".tif"))
        except (OSError, ValueError, KeyError):
            picture.save(path := path.with_suffix(".png"))
        return f"{path.name}: {mode}, {damage.flip(rng, path)}"
    if how == "exif":
        exif = Image.Exif()
        exif[0x0112] = rng.choice((0, 3, 6, 8, 9, 255, 65535))
        picture.save(path := path.with_suffix(rng.choice((".jpg", ".png", ".tif", ".webp"))), exif=exif)
        return f"{path.name}: orientation {exif[0x0112]}"
    if how == "eps":
        picture.save(folder / "eps", format="EPS")
        (folder / "eps").rename(path)
        return f"{path.name}: EPS"
    if how == "huge":
        side = rng.choice((20_000, 60_000, 2**31 - 1))
        path = path.with_suffix(rng.choice((".ppm", ".bmp", ".png")))
        if path.suffix == ".ppm":
            path.write_bytes(b"P6\n%d %d\n255\n" % (side, side))
        else:
            picture.save(path)
            data = bytearray(path.read_bytes())
            at = 18 if path.suffix == ".bmp" else 16
            data[at : at + 8] = (side.to_bytes(4, "little") if at == 18 else side.to_bytes(4, "big")) * 2
            path.write_bytes(data)
        return f"{path.name}: header of {side}x{side}"
    try:
        picture.save(path, **IMAGE_FORMATS[extension])
    except (OSError, ValueError, KeyError):  # this Pillow lacks the format
        picture.save(path := path.with_suffix(".png"))
    if how == "odd":
        return f"{path.name}: {damage.other_kind(rng, path)}"
    return f"{path.name}: {damage.any_bytes(rng, path)}"


def labelled_set(world: World, rng: Random, place: Path) -> Case:
    """A file of a labelled set, damaged, in probe."""
    folder = copy(world.set, place / "work" / "set")
    task = rng.choice(("segmentation", "depth", "normals"))
    target = damage.one_of(rng, folder / rng.choice(("images", {"segmentation": "labels"}.get(task, task))))
    if target.suffix == ".npy" and rng.random() < 0.4:
        values = rng.choice((np.zeros((0, 3)), np.full((48, 64, 3), np.nan), np.zeros((48, 64)), np.zeros((4, 4, 3), complex),
                             np.array([{}], object), np.full((48, 64, 3), 1e300), np.array(["a"])))  # fmt: skip
        np.save(target, values, allow_pickle=True)
        what = f"{target.name}: {values.dtype} {values.shape}"
        if rng.random() < 0.4:
            with target.open("wb") as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6, 3)}
                )
            what = f"{target.name}: a header of 10^6 x 10^6"
    elif rng.random() < 0.15:
        for path in folder.glob(f"*/{target.parent.name}/*.png"):
            if path.parent.parent.name in ("labels", "depth"):
                Image.fromarray(np.asarray(Image.open(path)) * 0 + (255 if "labels" in str(path) else 0)).save(path)
        what = f"all of {target.parent.name} void"
    else:
        what = damage.any_bytes(rng, target)
    recipe = place / "work" / "r.yaml"
    recipe.write_text(
        world.probe_recipe.read_text()
        .replace(str(world.set), str(folder))
        .replace("task: segmentation", f"task: {task}")
    )
    arguments = world.command("probe", place / "work" / "out")
    arguments[arguments.index("--recipe") + 1] = str(recipe)
    return Case(f"{task}: {what}", arguments)


def text_list(world: World, rng: Random, place: Path) -> Case:
    """Lists of paths, in which some lines are no images."""
    path = place / "work" / "list.txt"
    os.mkfifo(place / "work" / "pipe.png")
    (place / "work" / "folder.png").mkdir()
    (place / "work" / "loop.png").symlink_to("loop.png")
    (place / "work" / "video.mp4").write_bytes(rng.randbytes(200))
    odd = ("pipe.png", "folder.png", "loop.png", "/dev/zero", "/dev/tty", "~nobody_at_all/x.png", "a\0b.png", "x" * 300 + ".png", "\x1b[2J.png",
           "../" * 500 + "etc/passwd", "/proc/self/mem", "", " ", "#", "video.mp4", "list.txt", "é.png", "\ufeff", "*.png", "http://x/y.png", "0.png\r")  # fmt: skip
    lines = [str(world.photos / name) for name in world.alone]
    chosen = [rng.choice(odd) for _ in range(rng.choice((1, 1, 3)))]
    for line in chosen:
        lines.insert(rng.randrange(len(lines) + 1), line)
    data = "\n".join(lines).encode()
    what = f"lines {chosen}"[:150]
    path.write_bytes(data)
    if rng.random() < 0.25:
        what += f", {damage.any_bytes(rng, path)}"
    arguments = extract_alone(world, path, place / "work" / "out.h5")
    return Case(what, arguments, always=_good(world, place / "work" / "images"), output=("work/out.h5",))


def file_name(world: World, rng: Random, place: Path) -> Case:
    """Good images with odd names: each is computed, or is listed as a failure, and none disturbs the terminal."""
    folder = place / "work" / "images"
    folder.mkdir()
    odd = (f"a\n{FORGED}.png", "\x1b[31mred\x07.png", "\x9b2J.png", "-rf.png", "--overwrite.png", " .png", "a" * 251 + ".png", "é" * 125 + ".png",
           "%s%n{}{0}.png", "[bold]x.png", "index.h5.png", "con.png", "a.png.png", "a.npy.png", "~.png", "$HOME.png", "a b\tc.png", "\u202egnp.png",
           "a\r" + FORGED + ".png",   "A.PNG", "a.png", "[a-z].png", "*.png", "\u2028x.png", "#1.png", "0.jpg.png")  # fmt: skip
    names = rng.sample(odd, 4)
    sources = {}
    for number, name in enumerate(names):
        source = f"{number}.png"
        shutil.copy(world.photos / source, folder / name)
        sources[name] = source
    if rng.random() < 0.3:
        shutil.copy(world.photos / "0.png", os.fsencode(folder) + b"/\xff\xfe.png")
    if rng.random() < 0.3:
        (folder / f"bad\n{FORGED}\x1b[2J.png").write_text("no image")
    kind = rng.choice(("h5", "npy", "safetensors", "distill", "apply"))
    if kind in FORMATS:
        output = place / "work" / FORMATS[kind][0]
        arguments = world.command(kind, output)
        arguments[arguments.index("--input") + 1] = str(folder)
        arguments[arguments.index("--batch-size") + 1] = "1"

        def check() -> str | None:
            if not output.exists():
                return None if len(names) == 0 else "nothing was written"
            found = contents_of_features(output)
            known = {name: world.alone[source] for name, source in sources.items()} if kind != "safetensors" else {}
            lost = [name for name in sources if name not in found["maps"] and name not in found["failed"]]
            wrong = [name for name, digest in known.items() if found["maps"].get(name, digest) != digest]
            return f"lost {lost}, other maps of {wrong}" if lost or wrong else None

        more = [*(["--json"] if rng.random() < 0.3 else []), *(["--preview"] if rng.random() < 0.2 else [])]
        outputs = (f"work/{output.name}", f"work/{output.stem if kind == 'h5' else output.name}_preview")
        return Case(f"{kind}, {names}", [*arguments, *more], always=check, output=outputs)
    output = place / "work" / "out"
    arguments = _distil_alone(world, folder, output) if kind == "distill" else _predict_alone(world, folder, output)
    return Case(f"{kind}, {names}", arguments)


# Options and disks

PATH_OPTIONS = (
    ["extract", "--input", "PHOTOS", "--checkpoint", "MODEL", "--output"], ["extract", "--input"], ["extract", "--input", "PHOTOS", "--checkpoint"],
    ["extract", "--input", "PHOTOS", "--checkpoint", "MODEL", "--backbone-weights"], ["extract", "--checkpoint", "MODEL", "--export"],
    ["extract", "--input", "PHOTOS", "--checkpoint", "MODEL", "--format", "npy", "--output"],
    ["distill", "--recipe"], ["distill", "--recipe", "RECIPE", "--output"], ["distill", "--recipe", "RECIPE", "--images"], ["distill", "--recipe", "RECIPE", "--init"],
    ["distill", "--recipe", "RECIPE", "--backbone-weights"], ["distill", "--resume", "--output"], ["distill", "--copy-recipe", "vitl"],
    ["distill", "--recipe", "RECIPE", "--set", "cache.enabled=true", "--set", "views.kind=centre", "--output", "work/o", "--set", "cache.directory=VALUE"],
    ["probe", "--recipe"], ["probe", "--recipe", "PROBE", "--data"], ["probe", "--recipe", "PROBE", "--checkpoint", "MODEL", "--output"],
    ["probe", "--recipe", "PROBE", "--checkpoint", "MODEL", "--features"], ["probe", "--recipe", "PROBE", "--source"], ["probe", "--input", "PHOTOS", "--apply"],
    ["probe", "--apply", "HEAD", "--input"], ["probe", "--apply", "HEAD", "--input", "PHOTOS", "--output"],
    ["benchmark", "--models"], ["benchmark", "--checkpoint"], ["benchmark", "--checkpoint", "MODEL", "--images"], ["benchmark", "--checkpoint", "MODEL", "--dry-run", "--output"],
    ["benchmark", "--checkpoint", "MODEL", "--dry-run", "--baseline"], ["benchmark", "--ablate"], ["benchmark", "--ablate", "losses", "--recipe"],
)  # fmt: skip
NUMBER_OPTIONS = (
    ["extract", "--input", "PHOTOS", "--checkpoint", "MODEL", "--res"], ["extract", "--input", "PHOTOS", "--checkpoint", "MODEL", "--batch-size"],
    ["extract", "--input", "PHOTOS", "--checkpoint", "MODEL", "--workers"], ["extract", "--input", "PHOTOS", "--checkpoint", "MODEL", "--pca"],
    ["extract", "--input", "PHOTOS", "--checkpoint", "MODEL", "--device"], ["extract", "--input", "PHOTOS", "--checkpoint", "MODEL", "--every"],
    ["probe", "--recipe", "PROBE", "--checkpoint", "MODEL", "--dry-run", "--res"], ["probe", "--recipe", "PROBE", "--checkpoint", "MODEL", "--dry-run", "--seeds"],
    ["benchmark", "--checkpoint", "MODEL", "--dry-run", "--res"], ["benchmark", "--checkpoint", "MODEL", "--dry-run", "--budget"],
    ["benchmark", "--checkpoint", "MODEL", "--dry-run", "--seconds"], ["benchmark", "--checkpoint", "MODEL", "--dry-run", "--batch-size"],
    ["benchmark", "--ablate", "losses", "--recipe", "RECIPE", "--dry-run", "--steps"],
    ["distill", "--recipe", "RECIPE", "--device"],
)  # fmt: skip
NUMBERS = (
    "0",
    "-1",
    "1",
    "3.5",
    "1e400",
    "nan",
    "inf",
    "99999999999999999999",
    "x",
    "",
    "1,2",
    "..",
    "20000",
    "1000000000",
    "0x10",
    "1" * 5000,
)


def option(world: World, rng: Random, place: Path) -> Case:
    """Paths and numbers that no option can take."""
    work = place / "work"
    (work / "locked").mkdir()
    (work / "locked" / "x").write_text("x")
    (work / "file").write_text("text")
    (work / "unreadable").write_text("x")
    os.mkfifo(work / "pipe")
    (work / "loop").symlink_to("loop")
    paths = ("x" * 300, "x/" * 2100, str(work / "file" / "below"), str(work / "locked" / "x"), str(work / "locked" / "new" / "y"), str(work / "unreadable"),
             str(work / "pipe"), str(work / "loop"), "/dev/zero", "/dev/null", "/proc/self/mem", "/proc/nothing/x", "/", ".", "..", "", "~nobody_at_all/x",
             "\x1b[2Jx", "a\nb", "*", "[", "hf-hub:", "hf-hub:../x", "-", str(work / ("y" * 250 + ".h5")), str(work / ("y" * 250)), "é" * 128)  # fmt: skip
    arguments = list(rng.choice(PATH_OPTIONS if (of_path := rng.random() < 0.75) else NUMBER_OPTIONS))
    value = rng.choice(paths if of_path else NUMBERS)
    known = {
        "PHOTOS": world.photos,
        "MODEL": world.model,
        "RECIPE": world.recipe,
        "PROBE": world.probe_recipe,
        "HEAD": world.whole["probe"] / world.head,
    }
    if arguments[-1] == "--output" and not value.strip("."):
        value = str(work)  # what lies beside it would be the output
    if "cache.directory=VALUE" in arguments:
        arguments[-1] = f"cache.directory={json.dumps(value)}"
    else:
        arguments.append(value)
    arguments = [str(known.get(part, part)) for part in arguments]
    for path in ("locked", "unreadable"):
        (work / path).chmod(0)
    place.chmod(0o777)
    work.chmod(0o777)
    limits = Limits(nobody=True, seconds=90, memory=6 * GIB)
    return Case(
        f"{arguments[0]} ... {arguments[-2]} {arguments[-1][:60]!r}",
        arguments,
        output=("work", "runs", *(path for path in paths if "/" not in path and path.strip("."))),
        limits=limits,
    )


def small_disk(world: World, rng: Random, place: Path) -> Case:
    """No file may be longer than some bytes: an error, and the same command later ends as if nothing had been."""
    kind = rng.choice((*FORMATS, "run", "probe"))
    output = place / "work" / (FORMATS[kind][0] if kind in FORMATS else "out")
    if began := rng.random() < 0.5:
        copy(world.cut[kind], output)
    arguments = world.command(kind, output)
    size = rng.choice((0, 1, 100, 1000, rng.randrange(1, 4000), rng.randrange(1, 60_000), rng.randrange(1, 300_000)))

    def check() -> str | None:
        return holds_the_same(world, kind, output)()

    again = [*arguments]
    if kind == "run" and not began:
        again = [*arguments, "--overwrite"]
    limits = Limits(file_size=size)
    return Case(f"{kind}, {'continued' if began else 'new'}, files of {size} bytes at most", arguments, always=check, again=again,
                output=(f"work/{output.name}",), limits=limits)  # fmt: skip
