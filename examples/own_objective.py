"""An objective of your own: a class that derives from `Objective`, found by its import path.

python examples/own_objective.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from aft_ray import Objective, ScoredGroups, build_objective


class Margin(Objective):
    """Hinge loss: every better candidate must score at least `margin` nats per token above every worse one.

    The loss of a group is the mean over its pairs i ≻ j of max(0, margin - (s_i - s_j)); zero without a pair.
    """

    name = "margin"

    def __init__(self, margin: float = 0.5) -> None:
        self.margin = margin

    def group_sums(self, groups: ScoredGroups) -> Tensor:
        """The loss of each group, [groups] float32."""
        pairs = groups.ordered_pairs()
        scores = groups.masked_scores()
        hinge = (self.margin - (scores[:, :, None] - scores[:, None, :])).clamp_min(0.0)
        return (hinge * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp_min(1)


def main() -> None:
    objective = build_objective("examples.own_objective:Margin", margin=0.5)
    scores = torch.tensor([[-1.0, -0.8, -2.0], [-1.0, -0.9, -1.1]], requires_grad=True)
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    loss = objective(scores, rewards, torch.ones_like(rewards, dtype=torch.bool))
    loss.backward()
    print(f"loss {loss.item():.3f}; the second group has no wrong candidate and adds nothing")
    print(f"gradient of the scores: {scores.grad.tolist()}")


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the import path above is found
    main()
