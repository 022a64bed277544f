"""What all sections of a config have in common.

Invariant: importing this module and the sections imports no third-party package but pydantic.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0, description="seconds")]


class ConfigError(ValueError):
    """A config that cannot be used. The message is one sentence for the user."""


class Section(BaseModel):
    """A group of keys. It is immutable and refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False, protected_namespaces=())

    # The keys of this section that had another name in an earlier release: the old name and today's name.
    renamed_keys: ClassVar[dict[str, str]] = {}
    # What lists all keys of the config; an error message about an unknown key names it.
    key_list: ClassVar[str] = "`aft-ray keys`"

    def tree(self) -> dict[str, Any]:
        """The section as nested dicts of plain values, in the form of a YAML file."""
        return self.model_dump(mode="json")
