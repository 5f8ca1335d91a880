"""Ways to damage a file, each chosen by a random generator; every function returns what it did, in words."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

Damage = Callable[[Random, Path], str]
ODD_VALUES: Sequence[Any] = (
    0, -1, 1, 2**31, 2**63, -(2**63), 10**20, 0.5, -0.0, 1e308, float("inf"), float("nan"), True, False, None, "", "4", "x" * 300,
    "../../outside/precious.txt", "/etc/passwd", "\x1b[31mred\x07\nerror: forged", "\ud800", "é" * 200, [], {}, [[]], [1, 2], ["a"],
    {"a": 1}, [10**9, 10**9], "1e400", "NaN", "h5", "npy", "~nobody_at_all/x",
)  # fmt: skip
PIECES = (b"\0", b"\xff", b"\x80\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0" * 64, b"\xff" * 64, b"{}",
          b'"')  # fmt: skip


def flip(rng: Random, path: Path, low: int = 0, high: int | None = None) -> str:
    """Change up to eight bytes, which lie from `low` to `high`."""
    data = bytearray(path.read_bytes())
    places = [rng.randrange(low, min(high or len(data), len(data))) for _ in range(rng.choice((1, 1, 1, 2, 8)))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bits flipped at {places}"


def cut(rng: Random, path: Path) -> str:
    size = path.stat().st_size
    left = rng.choice((0, 1, 8, size // 2, size - 1, rng.randrange(size)))
    os.truncate(path, left)
    return f"cut to {left} of {size} bytes"


def lengthen(rng: Random, path: Path) -> str:
    more = rng.choice((b"\0" * 4096, b"x", rng.randbytes(100)))
    path.write_bytes(path.read_bytes() + more)
    return f"{len(more)} bytes more"


def overwrite(rng: Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    at, length = rng.randrange(len(data)), rng.choice((1, 4, 64, 1000, 4096))
    data[at : at + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))[: len(data) - at]
    path.write_bytes(data)
    return f"{length} bytes overwritten at {at}"


def splice(rng: Random, path: Path) -> str:
    """Insert, repeat or take out a stretch."""
    data = path.read_bytes()
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    piece, name = rng.choice(
        [(rng.choice(PIECES), "inserted"), (data[at:to][:5000] * 2, "repeated"), (b"", "taken out")]
    )
    path.write_bytes(data[:at] + piece + data[to if name == "taken out" else at :])
    return f"a stretch {name} at {at}"


def remove(_: Random, path: Path) -> str:
    path.unlink()
    return "deleted"


def other_kind(rng: Random, path: Path) -> str:
    """Something of another kind in its place: nothing in it, a text, a folder, a pipe, a link to itself or nowhere."""
    path.unlink()
    kind = rng.choice(("empty", "text", "folder", "pipe", "loop", "dangling", "device", "hdf5"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in ("loop", "dangling", "device"):
        path.symlink_to({"loop": path, "dangling": path.with_name("nowhere"), "device": "/dev/zero"}[kind])
    elif kind == "hdf5":
        with h5py.File(path, "w") as file:
            file["a"] = np.arange(3)
    else:
        path.write_bytes(
            b"" if kind == "empty" else rng.choice((b"text\n", b"\xff\xfe\0\0", b"[" * 20000, b"{}", b"null"))
        )
    return f"replaced by {kind}"


BYTES: Sequence[Damage] = (flip, flip, flip, cut, lengthen, overwrite, splice, remove, other_kind)


def any_bytes(rng: Random, path: Path) -> str:
    """One of the ways that know nothing of the format."""
    return rng.choice(BYTES)(rng, path)


def in_head(rng: Random, path: Path) -> str:
    """Bits flipped near the beginning, where the structure of most formats is."""
    return flip(rng, path, 0, rng.choice((64, 512, 4096)))


# HDF5


def _names(file: Any) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def hdf5_attribute(rng: Random, path: Path) -> str:
    with h5py.File(path, "r+") as file:
        key = rng.choice(list(file.attrs))
        value: Any = rng.choice(
            [np.arange(3), 5, np.float64("nan"), np.bytes_(b"\xff\xfe"), "", "{}", "[1]", "null", '{"a":', "x" * 30000,
             np.array(["a", "b"], dtype=h5py.string_dtype()), h5py.Empty("f4"), np.array(b"abc")]
        )  # fmt: skip
        if rng.random() < 0.2:
            del file.attrs[key]
            return f"attribute {key} deleted"
        file.attrs[key] = value
        return f"attribute {key} = {str(value)[:40]!r}"


def hdf5_description(rng: Random, path: Path) -> str:
    """A value within the description, which is JSON."""
    with h5py.File(path, "r+") as file:
        tree = json.loads(file.attrs["description"])
        node, trail = tree, []
        while isinstance(node, dict) and node:
            key = rng.choice(sorted(node))
            trail.append(key)
            if not isinstance(node[key], dict) or rng.random() < 0.3:
                break
            node = node[key]
        value = rng.choice(ODD_VALUES)
        if rng.random() < 0.15:
            del node[trail[-1]]
        else:
            node[trail[-1]] = value
        file.attrs["description"] = json.dumps(tree)
        return f"description.{'.'.join(trail)} = {value!r}"[:120]


def hdf5_values(rng: Random, path: Path) -> str:
    """Values of a dataset, in its own type."""
    with h5py.File(path, "r+") as file:
        name = rng.choice([name for name in _names(file) if file[name].size])
        data = file[name]
        row = rng.randrange(len(data))
        if data.dtype.kind in "SO":
            value: Any = rng.choice(
                [b"../../outside/precious.txt", b"/etc/passwd", b"", b"\xff\xfe", b"..", b"a/../..", b"\x1b[2J"]
            )
            width = data.dtype.itemsize
            value = value[:width] if data.dtype.kind == "S" else value
            if rng.random() < 0.3:  # a wider dataset, where the longest path fits
                old = [bytes(item) for item in data[:]]
                old[row] = rng.choice(
                    (b"../../outside/precious.txt", b"../" * 20 + b"etc/passwd", b"x/" * 3000, b"\xc3")
                )
                del file[name]
                file[name] = np.array(old)
                return f"{name}[{row}] = {old[row][:40]!r}, in a wider dataset"
        else:
            numbers = (0, 1, 2, 3, 17, 127, -1) if data.dtype.itemsize == 1 else (0, -1, 1, 5, 2**30)
            value = np.array(rng.choice(numbers)).astype(data.dtype)
        data[row] = value
        return f"{name}[{row}] = {value!r}"[:120]


def hdf5_dataset(rng: Random, path: Path) -> str:
    """A dataset of another type, shape, layout or place."""
    with h5py.File(path, "r+") as file:
        names = _names(file)
        name = rng.choice(names)
        values = file[name][:]
        fixed = values.astype("S") if values.dtype.kind == "O" else values
        how = rng.choice(("deleted", "group", "chunked", "compressed", "external", "virtual", "objects", "float64", "rows", "flat",
                          "link", "external link", "swapped", "huge", "big endian", "empty", "bool", "resizable"))  # fmt: skip
        del file[name]
        if how == "group":
            file.create_group(name)
        elif how == "chunked" and fixed.ndim:
            file.create_dataset(name, data=fixed, chunks=True)
        elif how in ("compressed", "resizable") and fixed.size:
            more = {"compression": "gzip"} if how == "compressed" else {"maxshape": (None, *fixed.shape[1:])}
            file.create_dataset(name, data=fixed, **more)
        elif how == "external":
            stored = path.parent / "external.bin"
            stored.write_bytes(fixed.tobytes())
            pieces = [(str(stored), 0, fixed.nbytes or 1)]
            file.create_dataset(name, shape=fixed.shape, dtype=fixed.dtype, external=pieces)
        elif how == "virtual" and fixed.size:
            file.create_virtual_dataset(name, h5py.VirtualLayout(fixed.shape, fixed.dtype))
        elif how == "objects":
            file.create_dataset(name, data=[str(n) * 5 for n in range(max(len(fixed), 1))], dtype=h5py.string_dtype())
        elif how == "rows":
            file[name] = fixed[: rng.choice((0, 1, max(len(fixed) - 1, 0)))]
        elif how == "flat":
            file[name] = fixed.reshape(-1)
        elif how == "link":
            file[name] = h5py.SoftLink(rng.choice(("/nowhere", f"/{name}", "/")))
        elif how == "external link":
            file[name] = h5py.ExternalLink(rng.choice(("other.h5", "/dev/zero", str(path))), rng.choice(names))
        elif how == "huge":
            space = (10**7, *(fixed.shape[1:] or (10**5,)))
            file.create_dataset(
                name, shape=space, dtype=fixed.dtype, chunks=tuple(min(side, 64) or 1 for side in space)
            )
        elif how == "empty":
            file[name] = h5py.Empty(fixed.dtype)
        elif how != "deleted":
            kinds = {"float64": "f8", "bool": "?", "swapped": "u2", "big endian": fixed.dtype.newbyteorder(">")}
            kind = kinds.get(how, "f4")
            file[name] = fixed if fixed.dtype.kind == "S" else fixed.astype(kind)
        return f"{name}: {how}"


HDF5: Sequence[Damage] = (
    hdf5_attribute,
    hdf5_description,
    hdf5_values,
    hdf5_values,
    hdf5_dataset,
    hdf5_dataset,
    in_head,
    any_bytes,
)


# safetensors


def safetensors_header(rng: Random, path: Path) -> str:
    """The length of the header, or a value within it."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.25:
        other = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
        path.write_bytes(struct.pack("<Q", other) + data[8:])
        return f"header of {other} bytes"
    tree = json.loads(data[8 : 8 + length])
    key = rng.choice([key for key in tree if key != "__metadata__"])
    what = rng.choice(("dtype", "shape", "data_offsets", "name", "deep"))
    if what == "name":
        tree[rng.choice(("../x", "", "\x1b[2J", "a" * 5000))] = tree.pop(key)
    else:
        tree[key]["shape" if what == "deep" else what] = {
            "dtype": rng.choice(("F64", "I8", "BOOL", "F8_E4M3", "BF16", "XX", 3)),
            "shape": rng.choice(([], [-1], [2**40, 2**40], [0], [2**63], "x", [1.5])),
            "data_offsets": rng.choice(([0, 0], [0, 2**60], [8, 0], [-1, 4], [0], None, [0, 4])),
            "deep": [[]],
        }[what]
    text = json.dumps(tree).encode() if what != "deep" else b"[" * 100_000
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return f"header: {key}.{what}"


def safetensors_metadata(rng: Random, path: Path) -> str:
    """A value within the metadata, which are JSON texts, all else left as it is."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    if not metadata:
        return in_head(rng, path)
    key = rng.choice(sorted(metadata))
    try:
        node = tree = json.loads(metadata[key])
    except ValueError:
        node = tree = None
    trail = [key]
    while isinstance(node, dict) and node:
        trail.append(rng.choice(sorted(node)))
        if not isinstance(node[trail[-1]], dict) or rng.random() < 0.2:
            break
        node = node[trail[-1]]
    value = rng.choice(ODD_VALUES)
    if isinstance(node, dict) and len(trail) > 1 and rng.random() < 0.85:
        node[trail[-1]] = value
        metadata[key] = json.dumps(tree)
    elif rng.random() < 0.4:
        del metadata[key]
    else:
        metadata[key] = rng.choice(("", "{", "null", "[" * 5000, "7", '"x"', json.dumps(value)))
    save_file(tensors, path, {name: text.encode("utf-8", "replace").decode() for name, text in metadata.items()})
    return f"metadata {'.'.join(trail)} = {value!r}"[:120]


def safetensors_tensor(rng: Random, path: Path) -> str:
    """A tensor of other values, shape or type, with the metadata as they are."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    key = rng.choice(sorted(tensors))
    value = tensors.pop(key)
    how = rng.choice(("gone", "nan", "huge", "flat", "int64", "longer", "empty", "extra", "changed"))
    new = {
        "nan": lambda: torch.full_like(value, float("nan")) if value.is_floating_point() else value + 1,
        "huge": lambda: torch.full_like(value, 6e4) if value.is_floating_point() else value + 10**9,
        "flat": lambda: value.reshape(-1) if value.ndim != 1 else value[None],
        "int64": lambda: value.to(torch.int64 if value.dtype != torch.int64 else torch.float32),
        "longer": lambda: torch.cat([value.reshape(-1)] * 2),
        "empty": lambda: value.reshape(-1)[:0],
        "extra": lambda: value,
        "changed": lambda: value.clone().reshape(-1).index_fill_(0, torch.tensor([0]), 1).reshape(value.shape)
        if value.numel() else value,
    }  # fmt: skip
    if how in new:
        tensors[key] = new[how]().contiguous()
    if how == "extra":
        tensors["extra.\x1b[31m"] = torch.zeros(2)
    save_file(tensors, path, metadata)
    return f"tensor {key}: {how}"


SAFETENSORS: Sequence[Damage] = (
    safetensors_header,
    *[safetensors_metadata] * 2,
    safetensors_tensor,
    in_head,
    any_bytes,
)


# Text


def text_lines(rng: Random, path: Path) -> str:
    """Lines of a text moved, repeated, taken out or spoilt."""
    lines = path.read_bytes().splitlines()
    at = rng.randrange(len(lines)) if lines else 0
    how = rng.choice(("taken out", "repeated", "cut", "not UTF-8", "NUL", "long", "shuffled", "null"))
    if not lines:
        lines = [b""]
    if how == "taken out":
        del lines[at]
    elif how == "repeated":
        lines.insert(at, lines[at])
    elif how == "shuffled":
        rng.shuffle(lines)
    else:
        lines[at] = {"cut": lines[at][: len(lines[at]) // 2], "not UTF-8": lines[at] + b"\xff\xfe", "NUL": lines[at] + b"\0",
                     "long": lines[at] + b"x" * 100_000, "null": b"null"}[how]  # fmt: skip
    path.write_bytes(b"\n".join(lines) + b"\n")
    return f"line {at} {how}"


def json_value(rng: Random, path: Path) -> str:
    """A value within a JSON file, or within one line of a .jsonl."""
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    at = rng.randrange(len(lines))
    node = tree = json.loads(lines[at])
    trail: list[str] = []
    while isinstance(node, (dict, list)) and node:
        key: Any = rng.choice(sorted(node)) if isinstance(node, dict) else rng.randrange(len(node))
        trail.append(str(key))
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.15:
            break
        node = node[key]
    value = rng.choice(ODD_VALUES)
    if rng.random() < 0.25:
        del node[key]
    else:
        node[key] = value
    lines[at] = json.dumps(tree)
    path.write_text("\n".join(lines) + "\n")
    return f"{'.'.join(trail)} = {value!r}"[:120]


def one_of(rng: Random, folder: Path, pattern: str = "*") -> Path:
    """A file below a folder."""
    return rng.choice(sorted(path for path in folder.rglob(pattern) if path.is_file()))


def damage(rng: Random, path: Path) -> str:
    """One of the ways that go with the file's name."""
    ways: Sequence[Damage] = {
        ".h5": HDF5,
        ".safetensors": SAFETENSORS,
        ".json": (json_value, json_value, text_lines, any_bytes),
        ".jsonl": (json_value, text_lines, text_lines, any_bytes),
        ".yaml": (text_lines, any_bytes),
        ".csv": (text_lines, any_bytes),
        ".npy": (in_head, any_bytes),
    }.get(path.suffix, (any_bytes,))
    return f"{path.name}: {rng.choice(ways)(rng, path)}"
