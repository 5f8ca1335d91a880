"""What the sections of a recipe have in common: closed models, and types of values that are checked on reading."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt

from brixel_cli.config.base import device_name

DeviceName = Annotated[str, AfterValidator(device_name)]
Side = PositiveInt | Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
"""A size in pixels: one side, or [height, width]."""
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Frozen, and closed: a key that is not listed is an error, never silently dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
