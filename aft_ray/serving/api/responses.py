"""What clients get, in our own shape and in OpenAI's.

Invariant: every answer names the policy version and the seed that made it, so that it can be made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aft_ray.serving.reasoning import Reasoned, ReasoningRequest, Scored

Json = dict[str, Any]
OpenAiKind = Literal["chat.completion", "text_completion"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One question answered. Times in seconds."""

    id: str
    created: int
    model: str
    ask: ReasoningRequest
    reasoned: Reasoned
    queued_s: float
    total_s: float

    @property
    def prompt_tokens(self) -> int:
        return len(self.ask.prompt_token_ids)


def usage(answers: Sequence[Answer]) -> Json:
    """All tokens that were generated, those of candidates that did not win included."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(answer.reasoned.tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def reason_body(answer: Answer) -> Json:
    """The answer of POST /v1/reason."""
    return {
        "id": answer.id,
        "object": "reason",
        "created": answer.created,
        "model": answer.model,
        **_verdict(answer),
        "response": answer.reasoned.winner.text,
        "candidates": candidate_rows(answer.reasoned),
        "usage": usage([answer]),
    }


def _verdict(answer: Answer) -> Json:
    """How an answer came about, which both shapes tell."""
    reasoned = answer.reasoned
    return {
        "version": reasoned.version,
        "strategy": answer.ask.strategy,
        "answer": reasoned.winner.answer,
        "confidence": round(reasoned.ranking.confidence, 6),
        "agreement": round(reasoned.ranking.agreement, 6),
        "explanation": explanation(answer),
        "seed": answer.ask.seed,
        "sampling": {
            "asked": answer.ask.n,
            "sampled": len(reasoned.candidates),
            "stopped": reasoned.stopped,
            "tokens_saved": reasoned.tokens_saved,
        },
        "timings": {
            "queued_s": round(answer.queued_s, 4),
            "sampling_s": round(reasoned.sampling_s, 4),
            "total_s": round(answer.total_s, 4),
        },
    }


def candidate_row(candidate: Scored) -> Json:
    """A candidate before the ranking. Equal answers have equal keys, however they are spelled."""
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


def candidate_rows(reasoned: Reasoned) -> list[Json]:
    """All candidates, best first, each with how many give its answer."""
    keys = [candidate.key for candidate in reasoned.candidates]
    return [
        {
            "rank": rank,
            "votes": 0 if candidate.key is None else keys.count(candidate.key),
            **candidate_row(candidate),
        }
        for rank, candidate in enumerate(reasoned.candidates, start=1)
    ]


def explanation(answer: Answer) -> str:
    """Why the winner won, in a sentence."""
    reasoned, strategy = answer.reasoned, answer.ask.strategy
    winner, count = reasoned.winner, len(reasoned.candidates)
    said = "gives no answer" if winner.answer is None else f"says {winner.answer}"
    if strategy == "greedy":
        return f"The one greedy response {said}."
    if count == 1:
        return f"The one candidate {said}."
    if strategy == "score" or winner.answer is None:
        return f"The best score of {count} candidates, {winner.score:.3f}, is of one that {said}."
    votes = round(reasoned.ranking.agreement * count)
    text = f"{votes} of {count} candidates {'say' if votes != 1 else 'says'} {winner.answer}"
    if strategy == "weighted_vote":
        text += f", with {reasoned.ranking.confidence:.0%} of the weight by score"
    return text + "."


def openai_body(kind: OpenAiKind, answers: Sequence[Answer], choices: int, extras: Json) -> Json:
    """A chat completion, or a completion of one or more prompts: the best `choices` responses to each."""
    return {
        **_head(kind, answers[0]),
        "object": kind,
        "choices": [
            _choice(kind, position * choices + place, candidate)
            for position, answer in enumerate(answers)
            for place, candidate in enumerate(answer.reasoned.candidates[:choices])
        ],
        "usage": usage(answers),
        "aft_ray": extras,
    }


def openai_extras(answers: Sequence[Answer], include_candidates: bool, ignored: Sequence[str]) -> Json:
    """The field `aft_ray`: how the answer came about. Of several prompts, a list of the same."""
    details = [_verdict(answer) for answer in answers]
    if include_candidates:
        for detail, answer in zip(details, answers, strict=True):
            detail["candidates"] = candidate_rows(answer.reasoned)
    extras = details[0] if len(details) == 1 else {"prompts": details}
    return extras | ({"ignored": list(ignored)} if ignored else {})


def openai_chunks(kind: OpenAiKind, answer: Answer, choices: int, extras: Json) -> Iterator[Json]:
    """A finished answer as the chunks of a stream, without usage."""
    for place, candidate in enumerate(answer.reasoned.candidates[:choices]):
        yield text_chunk(kind, answer, place, candidate.text, first=True)
        yield last_chunk(kind, answer, place, candidate.finish_reason, extras if place == 0 else None)


@dataclass(frozen=True, slots=True)
class Opening:
    """What is known of an answer before it is there."""

    id: str
    created: int
    model: str


def text_chunk(kind: OpenAiKind, of: Answer | Opening, place: int, text: str, first: bool) -> Json:
    if kind == "text_completion":
        return _chunk(kind, of, {"index": place, "text": text, "logprobs": None, "finish_reason": None})
    delta = {"role": "assistant", "content": text} if first else {"content": text}
    return _chunk(kind, of, {"index": place, "delta": delta, "logprobs": None, "finish_reason": None})


def last_chunk(kind: OpenAiKind, answer: Answer, place: int, finish_reason: str, extras: Json | None) -> Json:
    """The end of a choice; the first one's also says how the answer came about."""
    nothing: Json = {"text": ""} if kind == "text_completion" else {"delta": {}}
    chunk = _chunk(kind, answer, {"index": place, **nothing, "logprobs": None, "finish_reason": finish_reason})
    return chunk if extras is None else chunk | {"aft_ray": extras}


def usage_chunk(kind: OpenAiKind, answer: Answer) -> Json:
    """The tokens, after all choices, for clients that ask for them."""
    return _chunk(kind, answer, None) | {"usage": usage([answer])}


def event(data: Json | str, name: str | None = None) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def _choice(kind: OpenAiKind, index: int, candidate: Scored) -> Json:
    common = {"index": index, "logprobs": None, "finish_reason": candidate.finish_reason}
    if kind == "text_completion":
        return common | {"text": candidate.text}
    return common | {"message": {"role": "assistant", "content": candidate.text, "refusal": None}}


def _chunk(kind: OpenAiKind, of: Answer | Opening, choice: Json | None) -> Json:
    name = "chat.completion.chunk" if kind == "chat.completion" else kind
    return {**_head(kind, of), "object": name, "choices": [] if choice is None else [choice]}


def _head(kind: OpenAiKind, of: Answer | Opening) -> Json:
    head: Json = {"id": of.id, "created": of.created, "model": of.model}
    if isinstance(of, Answer) and of.reasoned.version is not None:
        head["system_fingerprint"] = f"version-{of.reasoned.version}"
    return head
