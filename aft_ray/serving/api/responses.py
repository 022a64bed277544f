"""The bodies of responses, in our own format and in OpenAI's.

Invariant: every answer names the policy version and the seed that made it, so that it can be reproduced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aft_ray.serving.reasoning import ReasoningRequest, ReasoningResult, ScoredCandidate

Json = dict[str, Any]
OpenAiKind = Literal["chat.completion", "text_completion"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered question.

    Attributes:
        created: Unix time in seconds.
        queued_s: seconds that the question waited in the queue.
        total_s: seconds in the queue and of sampling together.
    """

    id: str
    created: int
    model: str
    request: ReasoningRequest
    result: ReasoningResult
    queued_s: float
    total_s: float

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)


def usage(answers: Sequence[Answer]) -> Json:
    """Returns OpenAI's `usage`, with the tokens of all candidates, also of those that did not win."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(answer.result.tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def reason_body(answer: Answer) -> Json:
    """Returns the body of a response of POST /v1/reason."""
    return {
        "id": answer.id,
        "object": "reason",
        "created": answer.created,
        "model": answer.model,
        **_answer_details(answer),
        "response": answer.result.winner.text,
        "candidates": candidate_rows(answer.result),
        "usage": usage([answer]),
    }


def _answer_details(answer: Answer) -> Json:
    """Returns the fields about the ranking that both APIs give."""
    result = answer.result
    return {
        "version": result.version,
        "strategy": answer.request.strategy,
        "answer": result.winner.answer,
        "confidence": round(result.ranking.confidence, 6),
        "agreement": round(result.ranking.agreement, 6),
        "explanation": explanation(answer),
        "seed": answer.request.seed,
        "sampling": {
            "asked": answer.request.n,
            "sampled": len(result.candidates),
            "stopped": result.stopped,
            "tokens_saved": result.tokens_saved,
        },
        "timings": {
            "queued_s": round(answer.queued_s, 4),
            "sampling_s": round(result.sampling_s, 4),
            "total_s": round(answer.total_s, 4),
        },
    }


def candidate_row(candidate: ScoredCandidate) -> Json:
    """Returns a candidate without rank and votes. Equal answers have equal keys, however they are spelled."""
    return {
        "index": candidate.index,
        "answer": candidate.answer,
        "key": candidate.key,
        "response": candidate.text,
        "score": candidate.score,
        "weight": candidate.vote.weight,
        "tokens": candidate.tokens,
        "finish_reason": candidate.finish_reason,
    }


def candidate_rows(result: ReasoningResult) -> list[Json]:
    """Returns all candidates, best first, each with its rank and the number of candidates that give its answer."""
    keys = [candidate.key for candidate in result.candidates]
    return [
        {
            "rank": rank,
            "votes": 0 if candidate.key is None else keys.count(candidate.key),
            **candidate_row(candidate),
        }
        for rank, candidate in enumerate(result.candidates, start=1)
    ]


def explanation(answer: Answer) -> str:
    """Returns a sentence that says why the winner won."""
    result, strategy = answer.result, answer.request.strategy
    winner, count = result.winner, len(result.candidates)
    statement = "gives no answer" if winner.answer is None else f"says {winner.answer}"
    if strategy == "greedy":
        return f"The one greedy response {statement}."
    if count == 1:
        return f"The one candidate {statement}."
    if strategy == "score" or winner.answer is None:
        return f"The best score of {count} candidates, {winner.score:.3f}, is of one that {statement}."
    votes = round(result.ranking.agreement * count)
    text = f"{votes} of {count} candidates {'say' if votes != 1 else 'says'} {winner.answer}"
    if strategy == "weighted_vote":
        text += f", with {result.ranking.confidence:.0%} of the weight by score"
    return text + "."


def openai_body(kind: OpenAiKind, answers: Sequence[Answer], choices: int, extras: Json) -> Json:
    """Returns a chat completion, or a completion of one or more prompts, with the best `choices` responses to each."""
    return {
        **_header_fields(answers[0]),
        "object": kind,
        "choices": [
            _choice(kind, position * choices + index, candidate)
            for position, answer in enumerate(answers)
            for index, candidate in enumerate(answer.result.candidates[:choices])
        ],
        "usage": usage(answers),
        "aft_ray": extras,
    }


def openai_extras(answers: Sequence[Answer], include_candidates: bool, ignored: Sequence[str]) -> Json:
    """Returns the content of the field `aft_ray`: the details of the answer, or a list of them for several prompts."""
    details = [_answer_details(answer) for answer in answers]
    if include_candidates:
        for detail, answer in zip(details, answers, strict=True):
            detail["candidates"] = candidate_rows(answer.result)
    extras = details[0] if len(details) == 1 else {"prompts": details}
    return extras | ({"ignored": list(ignored)} if ignored else {})


def openai_chunks(kind: OpenAiKind, answer: Answer, choices: int, extras: Json) -> Iterator[Json]:
    """Yields a finished answer as the chunks of a stream, without usage."""
    for index, candidate in enumerate(answer.result.candidates[:choices]):
        yield text_chunk(kind, answer, index, candidate.text, first=True)
        yield last_chunk(kind, answer, index, candidate.finish_reason, extras if index == 0 else None)


@dataclass(frozen=True, slots=True)
class AnswerHeader:
    """The fields of an answer that are known before it is complete."""

    id: str
    created: int
    model: str


def text_chunk(kind: OpenAiKind, header: Answer | AnswerHeader, index: int, text: str, first: bool) -> Json:
    """Returns a chunk with text of the choice `index`. The `first` chunk of a choice also names the role."""
    if kind == "text_completion":
        return _chunk(kind, header, {"index": index, "text": text, "logprobs": None, "finish_reason": None})
    delta = {"role": "assistant", "content": text} if first else {"content": text}
    return _chunk(kind, header, {"index": index, "delta": delta, "logprobs": None, "finish_reason": None})


def last_chunk(kind: OpenAiKind, answer: Answer, index: int, finish_reason: str, extras: Json | None) -> Json:
    """Returns the chunk that ends a choice, with `extras` as its field `aft_ray`."""
    empty: Json = {"text": ""} if kind == "text_completion" else {"delta": {}}
    chunk = _chunk(kind, answer, {"index": index, **empty, "logprobs": None, "finish_reason": finish_reason})
    return chunk if extras is None else chunk | {"aft_ray": extras}


def usage_chunk(kind: OpenAiKind, answer: Answer) -> Json:
    """Returns the chunk with the usage, which is sent after all choices to clients that ask for it."""
    return _chunk(kind, answer, None) | {"usage": usage([answer])}


def _choice(kind: OpenAiKind, index: int, candidate: ScoredCandidate) -> Json:
    common = {"index": index, "logprobs": None, "finish_reason": candidate.finish_reason}
    if kind == "text_completion":
        return common | {"text": candidate.text}
    return common | {"message": {"role": "assistant", "content": candidate.text, "refusal": None}}


def _chunk(kind: OpenAiKind, header: Answer | AnswerHeader, choice: Json | None) -> Json:
    name = "chat.completion.chunk" if kind == "chat.completion" else kind
    return {**_header_fields(header), "object": name, "choices": [] if choice is None else [choice]}


def _header_fields(header: Answer | AnswerHeader) -> Json:
    fields: Json = {"id": header.id, "created": header.created, "model": header.model}
    if isinstance(header, Answer) and header.result.version is not None:
        fields["system_fingerprint"] = f"version-{header.result.version}"
    return fields
