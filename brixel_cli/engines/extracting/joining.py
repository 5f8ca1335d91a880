"""The parts of an output, as shards have written them, as one file: by reference, or copied."""

from __future__ import annotations

import glob
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from brixel_cli.config.section import difference_lines, differences
from brixel_cli.config.shard import PART, UNFINISHED, Shard
from brixel_cli.core.files import locked, replacing
from brixel_cli.core.formatting import human_size
from brixel_cli.data.checksums import ROW_SUMS
from brixel_cli.data.columns import Column
from brixel_cli.data.feature_file import FeatureFile
from brixel_cli.data.feature_index import check_description, check_index
from brixel_cli.data.grouping import positions_within_size
from brixel_cli.data.row_store import FAILED, REASON, STATUS, Array, Store, create_store, num_open
from brixel_cli.data.virtual_rows import PARTS, Run, VirtualColumn
from brixel_cli.engines.extracting.parts import ASKED, ASKED_FILES, unfinished
from brixel_cli.engines.reporting import Reporter
from brixel_cli.errors import BrixelError, UsageError

OF_PART = ("shard.number", ASKED, ASKED_FILES, "root", "threads", "device", "versions", "backbone_weights", "tf32")
"""Keys of a description in which parts of one output may differ."""
MOST_NAMED = 8
MAP_DIMENSIONS = 4
"""Of a dataset of maps: rows, channels, height, width. Only these have a dataset for each grid."""
PLAIN_OPEN = 0.9
"""Share of the files that a process may open which plain h5py is left with."""


@dataclass(frozen=True)
class Joined:
    """A joined file.

    Attributes:
        output: the file.
        num_parts: how many it was made of.
        num_images: its rows.
        num_failed: rows without features.
        copied: whether it holds the maps itself.
        num_bytes: of the file.
    """

    output: Path
    num_parts: int
    num_images: int
    num_failed: int
    copied: bool
    num_bytes: int


@dataclass(frozen=True)
class _Part:
    """What is kept of a part: its index, and the kinds of its datasets."""

    path: Path
    description: dict[str, Any]
    format: str
    index: dict[str, Array]
    fixed: dict[str, Array]
    columns: dict[str, tuple[tuple[int, ...], str]]

    def __len__(self) -> int:
        return len(self.index[STATUS])


def join(pattern: str, output: Path, copy: bool, overwrite: bool, reporter: Reporter) -> Joined:
    """Make one file of all parts of an output: the file that one process would have written.

    Args:
        pattern: of the parts' names, such as `out/photos.*.h5`.
        output: the file to be made.
        copy: whether it holds the maps itself; else it refers to the parts, which must stay where they are.
        overwrite: whether a feature file of that name is replaced.
        reporter: hears of progress.

    Raises:
        UsageError: no part is there, or they are of several outputs, or the output cannot be named so.
        BrixelError: parts are missing, incomplete, damaged, or do not belong together.
    """
    paths = _all_parts(pattern)
    if output.exists() and not overwrite:
        raise UsageError(f"{output} is there already. Give --overwrite to replace it, or another --output.")
    if output.exists():
        FeatureFile(output)  # nothing else is replaced
    if output.resolve() in [path.resolve() for path in paths]:
        raise UsageError(f"{output} is one of the parts, which would be lost: give another --output.")
    folder = output.resolve().parent
    outside = [path for path in paths if not path.resolve().is_relative_to(folder)]
    if outside and not copy:
        raise UsageError(
            f"{outside[0]} does not lie below {folder}, the folder of the output, where the parts of a joined file "
            "are looked for. Name an --output beside the parts, or above, or give --copy."
        )
    parts = []
    with reporter.bar("reading parts", len(paths), unit="part") as bar:
        for path in paths:
            parts.append(_read(path))
            bar.update(1)
    _check_whole(parts)
    index = {name: np.concatenate([part.index[name] for part in parts]) for name in parts[0].index}
    _check_names(parts, index["paths"])
    columns = _columns(parts, index)
    description = {
        key: value for key, value in parts[0].description.items() if key not in ("shard", ASKED, ASKED_FILES)
    }
    description["batch_sizes"] = {
        size: count for part in reversed(parts) for size, count in part.description["batch_sizes"].items()
    }
    filled, attributes = index | parts[0].fixed, {"format": parts[0].format}
    with locked(output), replacing(output) as partial:
        if copy:
            solid = {name: Column(c.shape[1:], c.dtype, c.shape[0], _targets(c)) for name, c in columns.items()}
            create_store(partial, len(index[STATUS]), solid, description, filled, attributes)
            _copy(Store(partial, writable=True), columns, {str(path): path for path in paths}, reporter)
        else:
            named = {str(path): path.resolve().relative_to(folder).as_posix() for path in paths}
            attributes[PARTS] = json.dumps({named[str(path)]: path.stat().st_size for path in paths})
            virtual = {name: _renamed(column, named) for name, column in columns.items()}
            create_store(partial, len(index[STATUS]), {}, description, filled, attributes, virtual)
        FeatureFile(partial)
    if not copy:
        _warn_of_open_files(len(parts), reporter)
    num_failed = int((index[STATUS] == FAILED).sum())
    return Joined(output, len(parts), len(index[STATUS]), num_failed, copy, output.stat().st_size)


def _all_parts(pattern: str) -> list[Path]:
    """The parts of the output that a pattern names, in order.

    Raises:
        UsageError: there are none, or those of several outputs.
        BrixelError: some are missing or incomplete.
    """
    matches = [Path(match) for match in glob.glob(os.path.expanduser(pattern))]
    found = {path: name for path in matches if (name := PART.fullmatch(path.name.removesuffix(UNFINISHED)))}
    sets = sorted({(path.parent / name["stem"], int(name["count"])) for path, name in found.items()})
    if not sets:
        raise UsageError(
            f"--join {pattern}: no parts have such names. Quote a pattern of the files that --shard has written, "
            "such as 'out/photos.*.h5'."
        )
    if len(sets) > 1:
        listed = ", ".join(f"{stem}.*-of-{count:05d}.h5" for stem, count in sets[:MOST_NAMED])
        raise UsageError(f"--join {pattern} names parts of several outputs: {listed}. Give the pattern of one.")
    stem, count = sets[0]
    paths = [Shard(number, count).path(stem.with_name(f"{stem.name}.h5")) for number in range(1, count + 1)]
    if lacking := [path for path in paths if not path.is_file()]:
        begun = {path: unfinished(path) for path in lacking if unfinished(path).is_file()}
        known = next((path for path in (*paths, *begun.values()) if path.is_file()), None)
        states = {path: _state(begun[path]) if path in begun else "not there" for path in lacking}
        raise _incomplete(states, count, known)
    return paths


def _state(path: Path) -> str:
    """How far a part has come."""
    status = Store(path).status
    return f"{num_open(status):,} of {len(status):,} images are left"


def _incomplete(states: Mapping[Path, str], count: int, known: Path | None) -> BrixelError:
    """The error that parts are not complete, with the command that completes them, as another part knows it."""
    lines = [f"{path.name}: {state}" for path, state in list(states.items())[:MOST_NAMED]]
    lines += [f"and {len(states) - MOST_NAMED} more"] if len(states) > MOST_NAMED else []
    first, shards = next(iter(states)), [str(_shard_of(path)) for path in states]
    words = Store(known).description.get(ASKED, []) if known else []
    output = first.with_name(f"{(PART.fullmatch(first.name) or {'stem': ''})['stem']}.h5")
    command = shlex.join(["brixel", "extract", *words, "--output", str(output), "--shard", shards[0]])
    also = f" The same with --shard {', '.join(shards[1:MOST_NAMED])} completes the others." if shards[1:] else ""
    listed = "\n".join(lines)
    return BrixelError(
        f"{len(states)} of {count} parts are not complete:\n{listed}\nThis completes the first: {command}{also}"
    )


def _shard_of(path: Path) -> Shard:
    found = PART.fullmatch(path.name)
    assert found is not None
    return Shard(int(found["number"]), int(found["count"]))


def _read(path: Path) -> _Part:
    """A part without its maps.

    Raises:
        BrixelError: it is damaged, or is no part.
    """
    store = Store(path)  # closed at the end: a process may not have thousands of files open
    shard = store.description.get("shard")
    if store.damaged or not isinstance(shard, dict) or not isinstance(store.description.get("batch_sizes"), dict):
        damaged = (
            f"its datasets {', '.join(store.damaged)} are damaged" if store.damaged else "it is no part of a split"
        )
        raise BrixelError(f"{path} cannot be joined: {damaged}. The command that wrote it computes it again.")
    try:
        check_description(store.description)
        check_index(store)
    except (ValueError, BrixelError) as error:
        raise BrixelError(
            f"{path} cannot be joined: {str(error).removesuffix('.')}. The command that wrote it computes it again."
        ) from error
    filled = {*store.fixed, STATUS, REASON, *ROW_SUMS} & set(store)
    fixed = {name for name in filled if name.startswith("pca_")}
    kinds = {name: store.kind(name) for name in set(store) - filled}
    return _Part(
        path,
        store.description,
        store.attributes.get("format", "unmarked"),
        {name: np.array(store.array(name)) for name in sorted(filled - fixed)},
        {name: np.array(store.array(name)) for name in sorted(fixed)},
        {name: (shape, dtype.name) for name, (shape, dtype) in sorted(kinds.items())},
    )


def _check_whole(parts: Sequence[_Part]) -> None:
    """Raise a BrixelError where parts are of different outputs, or have rows that are not settled."""
    first, count = parts[0], len(parts)
    for part in parts:
        changed = differences(first.description, part.description, ignored=(*OF_PART, "batch_sizes"))
        lines = difference_lines(changed)
        if part.format != first.format:
            lines.append(f"format: {first.format} -> {part.format}")
        elif part.index.keys() != first.index.keys():
            lines.append(f"datasets of the index: {', '.join(first.index)} -> {', '.join(part.index)}")
        if part.fixed.keys() != first.fixed.keys() or not all(
            np.array_equal(values, part.fixed[name]) for name, values in first.fixed.items()
        ):
            lines.append("the principal components")
        if lines:
            listed = "\n".join(lines)
            raise BrixelError(
                f"{part.path} does not belong with {first.path}; there is another:\n{listed}\n"
                f"Compute it again with the command of the others and --shard {_shard_of(part.path)} --overwrite."
            )
    states = {part.path: num_open(part.index[STATUS]) for part in parts}
    if left := {path: f"{number:,} images are to be computed again" for path, number in states.items() if number}:
        raise _incomplete(left, count, next(iter(left)))


def _check_names(parts: Sequence[_Part], names: Array) -> None:
    """Raise a BrixelError where parts are renamed, or hold the same image twice."""
    for part in parts:
        shard = part.description["shard"]
        if (shard.get("number"), shard.get("count")) != (_shard_of(part.path).number, len(parts)):
            raise BrixelError(
                f"{part.path} is shard {shard.get('number')}/{shard.get('count')} by its contents. Give it its name."
            )
    unique, counts = np.unique(names, return_counts=True)
    if len(unique) < len(names):
        twice = bytes(unique[counts > 1][0]).decode()
        raise BrixelError(f"{twice} is in several parts of {parts[0].path}. Compute all parts again from one list.")


def _columns(parts: Sequence[_Part], index: dict[str, Array]) -> dict[str, VirtualColumn]:
    """The datasets that hold the maps, made of rows of the parts; renumbers `grid_row` of the index."""
    placed = index["grid_row"] >= 0
    grids = [tuple(map(int, grid)) if on else None for grid, on in zip(index["grid_size"], placed, strict=True)]
    mixed = len({grid for grid in grids if grid}) > 1
    rows = np.array(positions_within_size(grids), np.int64) if mixed else np.arange(len(grids))
    of_part = np.cumsum([0, *map(len, parts)])
    runs: dict[str, list[Run]] = {}
    kinds: dict[str, tuple[tuple[int, ...], str]] = {}
    sources: dict[tuple[str, str], int] = {}
    for part, start in zip(parts, of_part, strict=False):
        own = np.flatnonzero(part.index["grid_row"] >= 0)
        for dataset, (shape, dtype) in part.columns.items():
            base, _, leaf = dataset.partition("/")
            name, chosen, source = base, own, own
            if leaf:
                chosen = own[(part.index["grid_size"][own] == _image_grid(base, shape, part)).all(axis=1)]
                source = part.index["grid_row"][chosen]
            if mixed and len(shape) == MAP_DIMENSIONS:
                name, target = f"{base}/{human_size((shape[2], shape[3]))}", rows[start + chosen]
            else:
                target = start + chosen
            kinds[name] = shape[1:], dtype
            sources[str(part.path), dataset] = shape[0]
            runs.setdefault(name, []).extend(_runs(str(part.path), dataset, source, target))
    index["grid_row"] = np.where(placed, rows, -1)
    counts = {name: sum(run.count for run in found) if "/" in name else len(grids) for name, found in runs.items()}
    return {
        name: VirtualColumn((counts[name], *shape), dtype, runs[name], sources)
        for name, (shape, dtype) in kinds.items()
    }


def _image_grid(base: str, shape: Sequence[int], part: _Part) -> tuple[int, int]:
    """The grid of the images that a dataset of maps is of; those of blocks are coarser than the map."""
    factor = int(part.description["factor"]) if base.startswith("layer_") else 1
    return shape[2] * factor, shape[3] * factor


def _runs(part: str, dataset: str, source: Array, target: Array) -> Iterator[Run]:
    """Rows that are neighbours in a part and in the joined file."""
    cuts = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
    for at, to in zip(np.split(source, cuts), np.split(target, cuts), strict=True):
        if len(at):
            yield Run(int(to[0]), len(at), part, dataset, int(at[0]))


def _targets(column: VirtualColumn) -> list[int]:
    """The rows that have values."""
    return [row for run in column.runs for row in range(run.start, run.start + run.count)]


def _renamed(column: VirtualColumn, names: Mapping[str, str]) -> VirtualColumn:
    """A column with the parts as the joined file names them."""
    runs = [replace(run, part=names[run.part]) for run in column.runs]
    rows_of = {(names[part], dataset): count for (part, dataset), count in column.rows_of.items()}
    return replace(column, runs=runs, rows_of=rows_of)


def _copy(store: Store, columns: Mapping[str, VirtualColumn], paths: Mapping[str, Path], reporter: Reporter) -> None:
    """Copy all maps into a joined file, part by part."""
    with reporter.bar("copying", len(paths), unit="part") as bar:
        for name, path in paths.items():
            part = Store(path)
            for column, run in ((column, run) for column, c in columns.items() for run in c.runs if run.part == name):
                for row in range(run.count):
                    store.put(column, [run.start + row], list(part.read(run.dataset, [run.source + row])))
            bar.update(1)
    store.flush()


def _warn_of_open_files(num_parts: int, reporter: Reporter) -> None:
    """HDF5 gives zeros, without an error, for rows of parts that it cannot open."""
    try:
        import resource
    except ImportError:  # only POSIX has it
        return
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 < most * PLAIN_OPEN < num_parts:
        reporter.warn(
            f"plain h5py opens each of the {num_parts} parts that it reads, and reads zeros from those beyond the "
            f"{most} files that a process may open here: ulimit -n {2 * num_parts}. brixel's readers need no more."
        )
