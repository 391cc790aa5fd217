"""What the sections of the configuration are made from."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(ge=0.01, le=1)]
AboveOne = Annotated[float, Field(gt=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]


class Section(BaseModel):
    """Base of the sections: frozen, no unknown keys, no silent conversions (``"512"`` is no number)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
