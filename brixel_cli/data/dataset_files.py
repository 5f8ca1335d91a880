"""Files of a labelled set: images and their targets, found by the path patterns of a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from brixel_cli.config.labelled import ProbeRecipe, Split
from brixel_cli.data.images import file_stat, files_below
from brixel_cli.errors import BrixelError

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_SHOWN = 3


@dataclass(frozen=True)
class Entry:
    """An image of the set, by its path below the root, and the files that belong to it, by kind."""

    name: str
    image: Path
    files: Mapping[str, Path]


def find_entries(recipe: ProbeRecipe, split: Split, root: Path, patterns: Mapping[str, str]) -> list[Entry]:
    """The images of a split, each with the files that belong to it.

    Args:
        recipe: describes the set.
        split: `train` or `evaluate`.
        root: folder of the set.
        patterns: paths of what belongs to an image, by kind: labels, depth, normals, camera, poses.

    Returns:
        In the order of the list file; sorted by path where there is none.

    Raises:
        BrixelError: folder, list, image or target missing, or a target without image; it says what to download.
    """
    if not root.is_dir():
        raise BrixelError(f"There is no folder {root} for the data set {recipe.name}.\n{how_to_get(recipe, root)}")
    data, config = recipe.data, getattr(recipe.data, split)
    if data.list_file is None:
        found = _scan(root, data.images, config.split)
        _refuse_orphans(recipe, root, found, patterns, config.split)
        found = {path: words for path, words in found.items() if fnmatchcase(path, config.only or "*")}
        if not found:
            which = f" and {config.only}" if config.only else ""
            raise BrixelError(
                f"No image in {root} fits {_filled(data.images, {'split': config.split})}{which}, "
                f"the {config.split} images of {recipe.name}.\n{how_to_get(recipe, root)}"
            )
    else:
        found = _read_list(recipe, root, config.split, config.only)
    entries, lacking = [], []
    for path, words in found.items():
        files = {kind: _resolve(root, _filled(pattern, words)) for kind, pattern in patterns.items()}
        lacking += [f"{path} has no {kind}: {_filled(patterns[kind], words)}" for kind in files if files[kind] is None]
        entries.append(Entry(path, root / path, {kind: file for kind, file in files.items() if file is not None}))
    if lacking:
        raise BrixelError(
            f"{len(lacking)} files are missing for the {len(found)} {config.split} images of {recipe.name} in {root}:\n"
            f"{first_lines(lacking)}\n{how_to_get(recipe, root)}"
        )
    return entries


def how_to_get(recipe: ProbeRecipe, root: Path) -> str:
    """What to download and where to put it; of a set of the user's own, where it should be."""
    what = f"{recipe.data.download.strip()}\n" if recipe.data.download else ""
    return (
        f"{what}Put it into {root}, or name the folder where it is with --data DIR "
        "(--probe-data DIR of brixel benchmark)."
    )


def _filled(pattern: str, words: Mapping[str, str]) -> str:
    """A pattern with those of its placeholders filled in that are known."""
    return _PLACEHOLDER.sub(lambda match: words.get(match[1], match[0]), pattern)


def _scan(root: Path, pattern: str, split: str) -> dict[str, dict[str, str]]:
    """Paths below the root that a pattern fits, sorted, with what its placeholders stand for."""
    pattern = _filled(pattern, {"split": split})
    fits, start = _expression(pattern), _fixed_folder(pattern)
    found = {}
    unreadable: list[Path] = []
    files = files_below(root / start, unreadable=unreadable) if (root / start).is_dir() else []
    if unreadable:
        raise BrixelError(f"The folder {unreadable[0]} of the data set cannot be read: permission denied. Allow it.")
    for path in files:
        relative = path.relative_to(root).as_posix()
        match = fits.fullmatch(relative)
        if match:
            found[relative] = {"split": split, **match.groupdict()}
    return found


def _expression(pattern: str) -> re.Pattern[str]:
    seen: set[str] = set()
    parts = []
    for part in re.split(r"(\{\w+\}|\*)", pattern):
        word = part[1:-1]
        if part == "*":
            parts.append("[^/]*")
        elif not _PLACEHOLDER.fullmatch(part):
            parts.append(re.escape(part))
        elif word in seen:
            parts.append(f"(?P={word})")
        else:
            seen.add(word)
            parts.append(f"(?P<{word}>.+)")
    return re.compile("".join(parts), re.DOTALL)


def _fixed_folder(pattern: str) -> str:
    """The folders at the beginning of a pattern that hold no placeholder and no wildcard."""
    return re.split(r"[{*]", pattern, maxsplit=1)[0].rpartition("/")[0]


def _read_list(recipe: ProbeRecipe, root: Path, split: str, only: str | None) -> dict[str, dict[str, str]]:
    data = recipe.data
    assert data.list_file is not None
    path = root / _filled(data.list_file, {"split": split})
    try:
        file_stat(path)  # reading a pipe or a device might never end
        lines = path.read_text(encoding="utf-8").splitlines()
    except (BrixelError, OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).removesuffix(f": {path}")
        raise BrixelError(
            f"{path}, the list of the {split} images of {recipe.name}, cannot be read: {reason}.\n"
            f"{how_to_get(recipe, root)}"
        ) from error
    found: dict[str, dict[str, str]] = {}
    missing = []
    needed = {int(number) for pattern in _patterns(recipe) for number in re.findall(r"\{column(\d)\}", pattern)}
    for number, line in enumerate(lines, 1):
        columns = [word.lstrip("/") for word in line.split()]
        if not columns:
            continue
        if len(columns) < max(needed, default=1):
            raise BrixelError(
                f"{path}, line {number}: {max(needed)} words are expected, the name and its columns; found {line!r}."
            )
        words = {"split": split, "name": columns[0]}
        words |= {f"column{place}": word for place, word in enumerate(columns[1:], 2)}
        wanted = _filled(data.images, words)
        image = _resolve(root, wanted)
        if image is None:
            missing.append(f"line {number}, {columns[0]}: there is no {wanted}")
            continue
        relative = image.relative_to(root).as_posix()
        if relative in found:
            raise BrixelError(f"{path}, line {number}: {columns[0]} stands twice in the list.")
        if fnmatchcase(relative, only or "*"):
            found[relative] = words
    if missing:
        raise BrixelError(
            f"{path} lists {len(missing)} images that are not in {root}:\n{first_lines(missing)}\n"
            f"{how_to_get(recipe, root)}"
        )
    if not found:
        raise BrixelError(f"{path} lists no image{f' that fits {only}' if only else ''}.")
    return found


def _patterns(recipe: ProbeRecipe) -> list[str]:
    data = recipe.data
    sections = (data.labels, data.depth, data.normals, data.poses)
    return [data.images] + [section.files for section in sections if section is not None and section.files]


def _resolve(root: Path, path: str) -> Path | None:
    """The one file at a path, which may hold wildcards; None for no file, or several."""
    if "*" not in path:
        return root / path if (root / path).is_file() else None
    files = [file for file in root.glob(path) if file.is_file()]
    return files[0] if len(files) == 1 else None


def _refuse_orphans(
    recipe: ProbeRecipe, root: Path, found: Mapping[str, dict[str, str]], patterns: Mapping[str, str], split: str
) -> None:
    """A target without its image is an error: the set is not whole, and would be smaller than it seems."""
    images = recipe.data.images
    for kind in ("labels", "depth", "normals"):
        pattern = patterns.get(kind, "")
        shared = "{split}" in images and "{split}" not in pattern  # one folder of targets for all splits
        if not pattern or shared or "*" in pattern or "*" in images:
            continue
        claimed = {_filled(pattern, words) for words in found.values()}
        orphans = [path for path in _scan(root, pattern, split) if path not in claimed]
        if found and orphans:
            raise BrixelError(
                f"{len(orphans)} of the {len(orphans) + len(claimed)} files of {kind} of {recipe.name} ({split}) have "
                f"no image in {root}:\n{first_lines(orphans)}\nAdd the images, or take these files away."
            )


def first_lines(lines: Sequence[str]) -> str:
    """The first few of many lines, indented, and how many more there are."""
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join([*(f"  {line}" for line in lines[:_SHOWN]), *more])
