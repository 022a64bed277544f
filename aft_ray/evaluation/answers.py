"""What a model answered to a question: all that a figure of an evaluation is computed from, and nothing else.

Invariant: an answer knows by which seed it was sampled, so that figures per seed need no second bookkeeping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aft_ray.storage.records import Candidate, Verdict


@dataclass(frozen=True, slots=True)
class Response:
    """One response: its verdict, the answer extracted from it (None: it gives none) and how it came about.

    score: nats per token; None when the source of the response does not tell, -inf for a response without a token.
    seed: of the sampling; 0 for a greedy response, which has none.
    tokens: None when the source does not tell.
    """

    verdict: Verdict
    answer: str | None = None
    score: float | None = None
    seed: int = 0
    text: str = ""
    tokens: int | None = None

    @property
    def right(self) -> bool:
        return self.verdict is Verdict.RIGHT


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """A question with its greedy response (None: not asked for) and its samples, seed by seed in the order drawn."""

    id: str
    greedy: Response | None = None
    samples: Sequence[Response] = ()
    task: str = ""
    question: str = ""
    gold: str = ""

    def samples_of_seed(self, seed: int) -> list[Response]:
        return [sample for sample in self.samples if sample.seed == seed]


def response_from_candidate(candidate: Candidate, seed: int = 0) -> Response:
    return Response(
        candidate.verdict, candidate.answer, candidate.score, seed, candidate.text, len(candidate.token_ids)
    )


def missing_response(seed: int = 0) -> Response:
    """Stands for a response that never came: undecided, so that a failure cannot raise an accuracy."""
    return Response(Verdict.UNDECIDED, None, -math.inf, seed, "", 0)
