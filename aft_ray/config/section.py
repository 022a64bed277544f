"""What every section of the config shares: it refuses unknown keys, and its mistakes are one sentence.

Invariant: importing this and the sections brings in nothing but pydantic.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, description="seconds")]


class ConfigError(ValueError):
    """A config that cannot be run. The message is one sentence for the user."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False, protected_namespaces=())

    def tree(self) -> dict[str, Any]:
        """The section as nested dicts of plain values, as a file gives it."""
        return self.model_dump(mode="json")
