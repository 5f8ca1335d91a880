"""What the sections of a recipe have in common: closed models, checked types of values, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from brixel_cli.config.base import device_name

DeviceName = Annotated[str, AfterValidator(device_name)]
Pixels = Annotated[int, Field(gt=0, le=65536)]
Side = Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)]
"""A size in pixels: one side, or [height, width]."""
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Frozen, and closed: a key that is not listed is an error, never silently dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def differences(
    old: Section | Mapping[str, Any], new: Section | Mapping[str, Any], ignored: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """What differs between two configurations: by key path the old value and the new one, None where there is none.

    Args:
        old: a section, or a mapping of JSON values, whose mappings may be nested.
        new: as `old`.
        ignored: key paths whose values may differ; a section's name ignores the whole section.
    """
    before, after = (flatten(tree.model_dump() if isinstance(tree, Section) else tree) for tree in (old, new))
    sections = tuple(f"{key}." for key in ignored)
    return {
        key: (before.get(key), after.get(key))
        for key in before | after
        if before.get(key) != after.get(key) and key not in ignored and not key.startswith(sections)
    }


def difference_lines(found: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Differences for people: `key.path: old -> new`, long values cut."""
    return [f"{key}: {_shortened(before)} -> {_shortened(after)}" for key, (before, after) in found.items()]


def _shortened(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as one, by key path: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
