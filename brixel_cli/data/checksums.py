"""Checksums of feature files: XXH3, and those of earlier versions, with which their files are checked and continued.

A file has each under the names of its kind: those of its rows in a dataset, and in an attribute, as JSON, those of its
description and of the datasets that never change.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import xxhash

from brixel_cli.core.identity import checksum, earlier_checksum

DESCRIPTION = "description"
"""Attribute of a file, and the name of its checksum."""


@dataclass(frozen=True)
class Kind:
    """One kind of checksums.

    Attributes:
        dataset: with the checksums of rows.
        attribute: with those of what never changes.
        of: checksum of arrays, one after the other.
        of_bytes: checksum of the bytes of a text.
        shown: how the attribute has them.
    """

    dataset: str
    attribute: str
    of: Callable[..., int]
    of_bytes: Callable[[bytes], int]
    shown: Callable[[int], int | str]

    def fixed(self, description: str, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, int | str]:
        """What the attribute says of a description and of datasets that never change, by name."""
        sums = {DESCRIPTION: self.of_bytes(description.encode())} | {name: self.of(arrays[name]) for name in arrays}
        return {name: self.shown(value) for name, value in sums.items()}


XXH3 = Kind("xxh3", "xxh3", checksum, xxhash.xxh3_64_intdigest, "{:016x}".format)
EARLIER = Kind("checksum", "checksums", earlier_checksum, zlib.crc32, int)
KINDS = XXH3, EARLIER
CHECKSUM, CHECKSUMS = XXH3.dataset, XXH3.attribute
"""Dataset and attribute that new files have."""
ROW_SUMS = tuple(kind.dataset for kind in KINDS)


def kind_of_rows(datasets: Collection[str]) -> Kind | None:
    """The kind of a file's checksums of rows; None where it has none."""
    return next((kind for kind in KINDS if kind.dataset in datasets), None)


def fixed_sums(attributes: Mapping[str, str]) -> tuple[Kind, dict[str, int | str]]:
    """What a file's attribute says of what never changes, and its kind; nothing where the file has none.

    Raises:
        ValueError: it is no JSON object.
    """
    kind = next((kind for kind in KINDS if kind.attribute in attributes), XXH3)
    found = json.loads(attributes.get(kind.attribute, "{}"))
    if not isinstance(found, dict):
        raise ValueError("its checksums are no JSON object")
    return kind, found
