"""Records of what a model answered: the only input of the metrics of an evaluation.

Invariant: every sampled response carries the seed that it was sampled with, so metrics per seed need no other data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aft_ray.storage.records import Candidate, Verdict


@dataclass(frozen=True, slots=True)
class Response:
    """One response of a model to a question.

    Attributes:
        answer: the answer extracted from the text; None if the response gives none.
        score: mean log-probability in nats per token; None if unknown, -inf for a response without tokens.
        seed: the sampling seed; 0 for a greedy response, which does not depend on a seed.
        tokens: number of tokens; None if unknown.
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
    """A question with the responses of one model.

    Attributes:
        greedy: the greedy response; None if there is none.
        samples: the sampled responses, ordered by seed and then as they were drawn.
    """

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
    """A placeholder for a response that could not be sampled: undecided, so a failure cannot raise an accuracy."""
    return Response(Verdict.UNDECIDED, None, -math.inf, seed, "", 0)
