"""The objectives that `objective.name` can be, and the config section that chooses one of them.

Responsible for what must be known of an objective before torch is imported: where its class is, which options it takes
and which candidates it needs. Invariant: a line of `OBJECTIVES` says what the class itself declares (a test compares
them), so a new objective is one class and one line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from aft_ray.config.section import ConfigError, Section


@dataclass(frozen=True, slots=True)
class ObjectiveSpec:
    """What an objective class declares of itself, in a form that needs no torch.

    Attributes:
        path: the class, as `module:class`. Its docstring gives the formula and the source.
        options: the keys of `objective` that the class takes beside the weight.
        uses_candidates: the loss reads sampled candidates. If not, its rounds sample nothing.
        ranks_candidates: the loss compares candidates of different reward, so it needs at least two of them.
        right_candidates_only: the loss reads only candidates whose answer is right.
    """

    path: str
    options: tuple[str, ...] = ()
    uses_candidates: bool = True
    ranks_candidates: bool = True
    right_candidates_only: bool = False


OBJECTIVES: dict[str, ObjectiveSpec] = {
    "vft": ObjectiveSpec("aft_ray.objectives.supervised:Vft", uses_candidates=False, ranks_candidates=False),
    "rft": ObjectiveSpec("aft_ray.objectives.supervised:Rft", ranks_candidates=False, right_candidates_only=True),
    "align": ObjectiveSpec("aft_ray.objectives.alignment:Align"),
    "aft_detached": ObjectiveSpec("aft_ray.objectives.alignment:AftDetached"),
    "aft_detached_lowest": ObjectiveSpec("aft_ray.objectives.alignment:AftDetachedLowest"),
    "aft_boundary": ObjectiveSpec("aft_ray.objectives.alignment:AftBoundary", options=("beta",)),
    "rrhf": ObjectiveSpec("aft_ray.objectives.ranking:Rrhf"),
    "rrhf_detached": ObjectiveSpec("aft_ray.objectives.ranking:RrhfDetached"),
    "pro": ObjectiveSpec("aft_ray.objectives.ranking:Pro"),
    "pro_detached": ObjectiveSpec("aft_ray.objectives.ranking:ProDetached"),
    "dpo": ObjectiveSpec("aft_ray.objectives.preference:Dpo", options=("beta",)),
    "irpo": ObjectiveSpec("aft_ray.objectives.preference:Irpo", options=("beta", "alpha")),
    "dpop": ObjectiveSpec("aft_ray.objectives.preference:Dpop", options=("beta", "penalty")),
    "grpo": ObjectiveSpec("aft_ray.objectives.preference:Grpo", options=("clip", "kl")),
}


class ObjectiveConfig(Section):
    """The loss on a group: L = L_VFT + weight * L_A."""

    name: str = Field("aft_boundary", description="which objective; see docs/objectives.md")
    weight: float = Field(1.0, gt=0, description="weight of L_A beside L_VFT")
    beta: Annotated[float, Field(ge=0)] | Literal["auto"] | None = Field(
        None,
        description="aft_boundary: how far the boundary for wrong candidates is below the worst right score, nats per "
        "token, or auto (none: 0.15); dpo, irpo, dpop: strength of the preference (none: 0.1)",
    )
    alpha: float | None = Field(None, ge=0, description="irpo: weight of the better response's likelihood (none: 1)")
    penalty: float | None = Field(None, ge=0, description="dpop: weight of the penalty λ (none: 5)")
    clip: float | None = Field(None, gt=0, lt=1, description="grpo: how far the ratio may move from 1 (none: 0.2)")
    kl: float | None = Field(None, ge=0, description="grpo: weight of the KL term (none: 0.04)")

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in OBJECTIVES:
            raise ConfigError(f"objective.name={name!r}: input should be one of {', '.join(OBJECTIVES)}")
        return name

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        takes = self.spec.options
        for key in (key for key in type(self).model_fields if key not in ("name", "weight")):
            if getattr(self, key) is not None and key not in takes:
                known = f"it takes {', '.join(takes)}" if takes else "it takes none"
                raise ConfigError(f"objective.name={self.name} has no use for objective.{key}; {known}")
        if self.beta == "auto" and self.name != "aft_boundary":
            raise ConfigError(f"objective.beta=auto is for aft_boundary; {self.name} needs a number")
        return self

    @property
    def spec(self) -> ObjectiveSpec:
        """What the chosen objective declares of itself."""
        return OBJECTIVES[self.name]

    @property
    def options(self) -> dict[str, Any]:
        """The options that were set, as `build_objective` takes them beside the name."""
        return {key: value for key in self.spec.options if (value := getattr(self, key)) is not None}
