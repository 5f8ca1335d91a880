"""Tensors on disk: safetensors written atomically, and the import of the authors' released checkpoints.

Nothing here unpickles arbitrary objects: .pth files are read with torch's `weights_only`.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from brixel_cli.config.distill import AdapterConfig
from brixel_cli.core.deformable import DeformableAdapter
from brixel_cli.core.files import replacing
from brixel_cli.errors import WeightsError

CHECKSUM, MARK = "checksum", "crc32 "
"""Key of the metadata, and the beginning of its text: CRC-32 of the tensors and of the other metadata."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and string metadata as safetensors; a reader sees the old file or the new one, never a part.

    A checksum of both is written with them, which `load_tensors` looks at. The same values give the same bytes.

    Raises:
        BrixelError: the file cannot be written.
    """
    stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    with replacing(path) as partial:
        try:
            save_file(stored, partial, {**metadata, CHECKSUM: _checksum(stored, metadata)})
        except SafetensorError as error:  # what the disk objects to, in the library's own words
            raise OSError(str(error)) from error
        _sort_metadata(partial)
        partial.chmod(0o666 & ~_umask())  # the library writes files that only their owner can read
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    value = zlib.crc32(json.dumps(dict(metadata), sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode(), value)
        value = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, value)
    return f"{MARK}{value:08x}"


def _sort_metadata(path: Path) -> None:
    """Put the metadata, which the library writes in any order, in one: the same tensors make the same bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length))


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file alone, without looking at its tensors; errors as `load_tensors`."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a .safetensors file: tensors on the CPU, and its metadata.

    Raises:
        WeightsError: the file is missing or damaged; in one of `save_tensors` every change is noticed.
    """
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    marked = [key for key, text in metadata.items() if key == CHECKSUM or text.startswith(MARK)]
    expected = [metadata.pop(key) for key in marked]  # earlier versions wrote none
    if expected and expected != [_checksum(tensors, metadata)]:
        raise WeightsError(f"{path} is damaged: its contents do not have the checksum that was written with them.")
    return tensors, metadata


def check_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str) -> None:
    """Raise a WeightsError, beginning with `what`, that names every missing, unknown or misshapen key of `found`."""
    errors = [f"missing: {key}" for key in expected if key not in found]
    errors += [f"unknown: {key}" for key in found if key not in expected]
    errors += [
        f"misshapen: {key} is {tuple(found[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    if errors:
        listed = "\n".join(f"  {line}" for line in errors[:20])
        more = f"\n  and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise WeightsError(f"{what}: {len(errors)} of its keys are wrong.\n{listed}{more}")


def check_pth(path: Path) -> None:
    """Raise a WeightsError where a .pth file, a zip archive, does not have its checksums, which torch does not look at.

    Files without checksums, which torch can write too, and those of old versions, which are no archives, pass.
    """
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} is damaged: {error}. Put a copy that is whole in its place.") from error
    if damaged is not None:
        raise WeightsError(
            f"{path} is damaged: its part {damaged} does not have its checksum. Put a copy that is whole in its place."
        )


def load_pth(path: Path) -> dict[str, Tensor]:
    """Read a flat state dict from a .pth file on the CPU, without unpickling arbitrary objects.

    Raises:
        WeightsError: the file is missing, damaged, holds other objects than tensors, or is no flat state dict.
    """
    check_pth(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # of a dozen kinds in damaged pickles; torch's advice in them is to trust the file
        raise WeightsError(
            f"{path} is no state dict of plain tensors, or is damaged ({type(error).__name__}). brixel does not load "
            "files that can run code: save the state dict alone, or convert it to .safetensors."
        ) from error
    flat = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not flat or any(tensor.layout != torch.strided or tensor.is_quantized for tensor in state.values()):
        raise WeightsError(f"{path} is no flat state dict of tensors, as the released checkpoints are.")
    tensors: dict[str, Tensor] = state
    return tensors


@dataclass(frozen=True)
class ReleasedStudent:
    """A released checkpoint, translated.

    Attributes:
        tensors: the live tensors under the names of `DeformableAdapter`.
        embed_dim: channels D of the backbone it belongs to.
        skipped: names of the dead tensors, those that never reach the output, left out.
        num_skipped_parameters: trainable numbers in them.
        num_live_parameters: trainable numbers that were kept.
    """

    tensors: dict[str, Tensor]
    embed_dim: int
    skipped: tuple[str, ...]
    num_skipped_parameters: int
    num_live_parameters: int

    @property
    def summary(self) -> str:
        """One sentence on what was kept and what was skipped."""
        total = self.num_live_parameters + self.num_skipped_parameters
        return (
            f"{len(self.tensors)} tensors taken ({self.num_live_parameters:,} parameters); {len(self.skipped)} skipped "
            f"that never reach the output ({self.num_skipped_parameters:,} parameters, "
            f"{self.num_skipped_parameters / total:.0%}): {', '.join(_families(self.skipped))}"
        )


RELEASED_ADAPTER, RELEASED_FACTOR = AdapterConfig(kind="deformable", residual="half_grid"), 4
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


_DEAD_PREFIXES = (
    "adapter.spm.conv3.", "adapter.spm.conv4.", "adapter.spm.fc3.", "adapter.spm.fc4.",
    "adapter.up.", "adapter.norm2.", "adapter.norm3.", "adapter.norm4.", "adapter.guide_proj.0.",
)  # fmt: skip
_PREFIXES = {
    **{f"extractors.{level}.0.": f"adapter.interactions.{level}.extractor." for level in range(4)},
    **{f"extractors.3.{extra + 1}.": f"adapter.interactions.3.extra_extractors.{extra}." for extra in range(2)},
    **{f"{part}.": f"adapter.spm.{part}." for part in ("stem", "conv2", "fc1", "fc2")},
    "norm.": "adapter.norm1.",
    "level_embed": "adapter.level_embed",
    "head.norm.": "head.head_norm.ln.",
    "head.out.": "head.out_conv.",
}
"""How names of `DeformableAdapter` begin, and how the released ones do."""
_PARTS = {
    ".ffn.depthwise.": ".ffn.dwconv.dwconv.",
    ".norm.": ".block.0.ln.",
    ".depthwise.": ".block.1.",
    ".expand.": ".block.3.",
    ".project.": ".block.5.",
}
"""The same within a name, in this order."""


def _released_name(name: str) -> str:
    ours = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    name = _PREFIXES.get(ours, "") + name.removeprefix(ours)
    for part, released in _PARTS.items():
        name = name.replace(part, released)
    return name


def import_released(state: Mapping[str, Tensor], where: str = "The checkpoint") -> ReleasedStudent:
    """Translate the authors' released state dict (213 keys) to the names of `DeformableAdapter`.

    Args:
        state: the flat state dict of adapter and head.
        where: what to call the checkpoint in errors.

    Raises:
        WeightsError: a live key is missing, misshapen or unknown; nothing but the dead branches is skipped.
    """
    level_embed = state.get("adapter.level_embed")
    if level_embed is None or level_embed.ndim != 2 or not level_embed.numel():
        raise WeightsError(
            f"{where} is no released BRIXEL checkpoint: it has no key adapter.level_embed of shape (3, D)."
        )
    dim = level_embed.shape[1]
    skipped = tuple(key for key in state if key.startswith(_DEAD_PREFIXES))
    live = {key: tensor for key, tensor in state.items() if key not in skipped}
    with torch.device("meta"):
        adapter = DeformableAdapter(dim, RELEASED_FACTOR, RELEASED_ADAPTER)
    names = {name: _released_name(name) for name in adapter.state_dict()}
    expected = {names[name]: tensor for name, tensor in adapter.state_dict().items()}
    expected[names["level_embed"]] = torch.empty(3, dim, device="meta")
    check_keys(expected, live, f"{where} does not fit the released layout")
    tensors = {name: live[released] for name, released in names.items()}
    tensors["level_embed"] = level_embed[0].clone()
    dead_rows = 2 * dim  # of adapter.level_embed, for the strides that are left out
    return ReleasedStudent(
        tensors=tensors,
        embed_dim=dim,
        skipped=(*skipped, "adapter.level_embed[1:]"),
        num_skipped_parameters=dead_rows + sum(state[key].numel() for key in skipped if not key.endswith(_BUFFERS)),
        num_live_parameters=sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(_BUFFERS)),
    )


def _families(keys: tuple[str, ...]) -> list[str]:
    """The dead branches by name, without a line for each tensor."""
    return list(dict.fromkeys(".".join(key.split(".")[: 3 if ".spm." in key else 2]) for key in keys))
