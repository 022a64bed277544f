"""The AFT losses in a training loop of your own: plain torch, without Ray, vLLM or DeepSpeed.

A small model scores two candidate responses to a question and prefers the wrong one. The loss is L_VFT + L_A as in
arXiv 2309.02144: the likelihood of a reference response, here the right one, and `aft_boundary`, which ranks the right
response above the wrong one and stops lowering the wrong one when it is β below.

    python examples/losses_in_your_own_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aft_ray import build_objective

VOCABULARY, WIDTH = 16, 32
# [groups, k, tokens]: one group of two responses, the right one first.
RESPONSES = torch.tensor([[[3, 9, 5, 1], [3, 7, 2, 1]]])
REWARDS = torch.tensor([[1.0, 0.0]])


class TinyModel(nn.Module):
    """Predicts each token from the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(tokens))
        return logits


def scores_of(model: nn.Module, responses: Tensor) -> Tensor:
    """The score of each response: its mean token log-probability, nats per token, [groups, k]."""
    inputs = torch.cat([torch.zeros_like(responses[..., :1]), responses[..., :-1]], dim=-1)
    logprobs = model(inputs).log_softmax(-1)
    return logprobs.gather(-1, responses[..., None]).squeeze(-1).mean(-1)


def main() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    objective = build_objective("aft_boundary", beta=0.15)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    mask = torch.ones_like(REWARDS, dtype=torch.bool)
    for step in range(31):
        scores = scores_of(model, RESPONSES)
        reference_loss = -scores[:, 0].mean()
        loss = reference_loss + objective(scores, REWARDS, mask)
        if step % 10 == 0:
            right, wrong = scores[0].tolist()
            print(
                f"step {step:2}: loss {loss:.4f}, score of the right response {right:.3f}, of the wrong one {wrong:.3f}"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
