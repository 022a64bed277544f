"""How far the training of a round is, and what its steps have measured together.

Invariant: the `trained` event of a round covers each of its steps once, whether or not workers were started again in
the middle: what was measured before a training state is recorded with that state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from aft_ray.training.step import StepStats

# What is averaged over the steps. A step without a wrong candidate has no mean score of them: it does not count there.
_AVERAGED = ("loss", "vft_loss", "alignment_loss", "grad_norm", "right_score", "wrong_score")


@dataclass(slots=True)
class RoundProgress:
    """The steps of a round that have been taken.

    Attributes:
        steps: their number.
        seconds: the time that they took, with the planning of them.
        tokens: the tokens that the ranks computed in them.
        sums: for each measured value, the sum over the steps in which it was finite.
        counts: the number of these steps.
    """

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_AVERAGED, 0.0))
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_AVERAGED, 0))

    @classmethod
    def recorded(cls, metrics: Mapping[str, Any]) -> RoundProgress:
        """What `record` gave."""
        return cls(**metrics["progress"])

    def record(self) -> dict[str, Any]:
        """The progress as JSON values, for the record of a training state."""
        return {"progress": asdict(self)}

    def add(self, stats: StepStats) -> None:
        """Counts one more step; `seconds` is left to the caller."""
        self.steps += 1
        self.tokens += stats.tokens
        for name in _AVERAGED:
            if math.isfinite(value := getattr(stats, name)):
                self.sums[name] += value
                self.counts[name] += 1

    def summary(self) -> dict[str, Any]:
        """What the `trained` event says of the steps. A value that was finite in no step is None."""
        return {
            "steps": self.steps,
            "train_s": self.seconds,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens / self.seconds,
            **{name: self.sums[name] / self.counts[name] if self.counts[name] else None for name in _AVERAGED},
        }
