"""Files of answered questions: written by every evaluation, and read from aft-ray and from other programs.

A line of a generations file is one question as JSON; `docs/evaluation.md` lists the fields. Invariant: what is written
here is read back unchanged, and a value that is missing from a file stays unknown; it is never guessed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aft_ray.config.messages import first_line
from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.evaluation.answers import AnsweredQuestion, Response, response_from_candidate
from aft_ray.evaluation.statistics.bootstrap import finite_or_none
from aft_ray.storage.records import Verdict, table_to_groups

if TYPE_CHECKING:
    from aft_ray.tasks import Task
    from aft_ray.verify.result import VerificationResult

_VERIFICATION_BATCH = 500  # questions between two reports of progress
# Fields of a line that list one value per response, and the field of the response that each value is for.
_FIELD_OF_LIST = {"scores": "score", "logprobs": "logprobs", "verdicts": "verdict", "seeds": "seed"}
_VERDICTS: dict[Any, Verdict] = {True: Verdict.RIGHT, False: Verdict.WRONG, None: Verdict.UNDECIDED} | {
    verdict.value: verdict for verdict in Verdict
}


class _MalformedLine(ValueError):
    """A line of a generations file is invalid. The message says why."""


def generations_text(answered: Iterable[AnsweredQuestion]) -> str:
    """The text of a generations file with one line per question."""
    return "".join(json.dumps(_row(question), ensure_ascii=False) + "\n" for question in answered)


def _row(question: AnsweredQuestion) -> dict[str, Any]:
    return {
        "id": question.id,
        "task": question.task,
        "question": question.question,
        "gold": question.gold,
        "greedy": None if question.greedy is None else _response_row(question.greedy),
        "responses": [_response_row(sample) for sample in question.samples],
    }


def _response_row(response: Response) -> dict[str, Any]:
    return {
        "text": response.text,
        "answer": response.answer,
        "verdict": response.verdict.value,
        "score": None if response.score is None else finite_or_none(response.score),
        "tokens": response.tokens,
        "seed": response.seed,
    }


def read_generations(
    path: Path, config: RunConfig | None, progress: Callable[[int, int], None] | None = None
) -> list[AnsweredQuestion]:
    """Reads a generations file, a Parquet file of groups, or a directory of such Parquet files.

    Args:
        config: the config that names the task, which extracts and verifies every answer again. None: the answers and
            verdicts of the file are used.
        progress: is called with the number of verified questions and the number of all questions.

    Raises:
        ConfigError: the file cannot be used; the sentence names the line.
    """
    read = _read_groups(path) if path.is_dir() or path.suffix == ".parquet" else _read_lines(path, config is None)
    if config is None:
        return read
    return _verify_again(read, config, str(path), progress or (lambda done, total: None))


def _verify_again(
    read: list[AnsweredQuestion], config: RunConfig, file: str, progress: Callable[[int, int], None]
) -> list[AnsweredQuestion]:
    """The same responses with the answers and verdicts that the tasks of the config give."""
    from aft_ray.tasks import build_tasks
    from aft_ray.verify.process_pool import VerificationRequest, shared_verifier

    tasks = build_tasks(config)

    def task_of(question: AnsweredQuestion) -> Task:
        if len(tasks) == 1:
            return next(iter(tasks.values()))  # a file of another program may name the task differently
        if question.task not in tasks:
            raise ConfigError(
                f"{file}: the question {question.id!r} is of the task {question.task!r}, but the config has "
                f"{', '.join(tasks)}; name one of these in the line, or give a config with one task"
            )
        return tasks[question.task]

    def has_text(response: Response) -> bool:
        # A response has no text if it could not be sampled, or if the file gives only its verdict.
        return bool(response.text) and response.tokens != 0

    verified: list[AnsweredQuestion] = []
    for start in range(0, len(read), _VERIFICATION_BATCH):
        batch = read[start : start + _VERIFICATION_BATCH]
        all_responses = [(q, r) for q in batch for r in ([q.greedy] if q.greedy else []) + list(q.samples)]
        requests = [VerificationRequest(task_of(q), r.text, q.gold) for q, r in all_responses if has_text(r)]
        results = iter(shared_verifier().verify(requests))

        def relabel(response: Response, results: Iterator[VerificationResult] = results) -> Response:
            if not has_text(response):
                return response
            result = next(results)
            return replace(response, answer=result.answer, verdict=result.verdict)

        verified += [
            replace(
                question,
                greedy=question.greedy and relabel(question.greedy),
                samples=[relabel(sample) for sample in question.samples],
            )
            for question in batch
        ]
        progress(len(verified), len(read))
    return verified


def _read_groups(path: Path) -> list[AnsweredQuestion]:
    """The training samples of a round. Groups have no greedy response."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    answered: dict[str, AnsweredQuestion] = {}
    for file in files:
        try:
            groups = table_to_groups(pq.read_table(file))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ConfigError(f"{file} cannot be read as a file of groups: {first_line(error)}") from error
        for group in groups:
            one, samples = group.question, [response_from_candidate(candidate) for candidate in group.candidates]
            answered[one.id] = AnsweredQuestion(one.id, None, samples, one.task, one.text, one.gold)
    if not any(question.samples for question in answered.values()):
        raise ConfigError(f"{path} holds no group with samples; round 0 has none, so give the groups of a later round")
    return list(answered.values())


def _read_lines(path: Path, verdicts_needed: bool) -> list[AnsweredQuestion]:
    try:
        # Not splitlines(), because JSON text may contain other line separators.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the generations file {path}: {error}") from error
    answered: dict[str, AnsweredQuestion] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = _question(_object(line), verdicts_needed)
            if question.id in answered:
                raise _MalformedLine(f"the question {question.id!r} was answered by an earlier line already")
        except _MalformedLine as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        answered[question.id] = question
    if not answered:
        raise ConfigError(f"{path} has no line")
    return list(answered.values())


def _object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise _MalformedLine(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    if not isinstance(value, dict):
        raise _MalformedLine(f"a line must be an object of fields, not a {type(value).__name__}")
    return value


def _question(row: Mapping[str, Any], verdicts_needed: bool) -> AnsweredQuestion:
    text = _text(row, "question") or ""
    if row.get("id") is None and not text:
        raise _MalformedLine("it has neither an id nor a question")
    gold = row.get("gold", row.get("answer_key"))
    if gold is None:
        raise _MalformedLine("it has no gold answer (gold or answer_key)")
    responses = row.get("responses", [])
    if not isinstance(responses, list):
        raise _MalformedLine("responses must be a list")
    columns = {name: row[list_name] for list_name, name in _FIELD_OF_LIST.items() if row.get(list_name) is not None}
    for list_name, name in _FIELD_OF_LIST.items():
        if name in columns and (not isinstance(columns[name], list) or len(columns[name]) != len(responses)):
            raise _MalformedLine(f"{list_name} must be a list as long as responses")
    samples = []
    for index, value in enumerate(responses):
        fields = dict(value) if isinstance(value, dict) else {"text": value}
        fields |= {name: values[index] for name, values in columns.items()}
        samples.append(_response(fields, f"response {index + 1}", verdicts_needed))
    greedy = row.get("greedy")
    if greedy is not None:
        fields = greedy if isinstance(greedy, dict) else {"text": greedy}
        greedy = _response(fields, "the greedy response", verdicts_needed)
    if greedy is None and not samples:
        raise _MalformedLine("it has no responses and no greedy response")
    id = str(row["id"]) if row.get("id") is not None else hashlib.sha256(text.encode()).hexdigest()[:16]
    return AnsweredQuestion(id, greedy, samples, _text(row, "task") or "", text, str(gold))


def _response(fields: Mapping[str, Any], name: str, verdict_needed: bool) -> Response:
    text, answer = _text(fields, "text", name), fields.get("answer")
    if text is None and "verdict" not in fields:
        raise _MalformedLine(f"{name} has neither a text nor a verdict")
    if "verdict" not in fields and verdict_needed:
        raise _MalformedLine(f"{name} has no verdict; add --config CONFIG, whose task then verifies the answers")
    verdict = fields.get("verdict")
    if not isinstance(verdict, str | bool | None) or verdict not in _VERDICTS:
        raise _MalformedLine(f"{name} has the verdict {verdict!r}; it must be right, wrong or undecided")
    tokens = _number(fields, "tokens", name)
    score = _number(fields, "score", name)
    logprobs = fields.get("logprobs")
    if logprobs is not None:
        if not isinstance(logprobs, list) or not all(_is_number(value) for value in logprobs):
            raise _MalformedLine(f"{name}: logprobs must be a list of numbers, one per token")
        tokens = len(logprobs) if tokens is None else tokens
        score = math.fsum(logprobs) / len(logprobs) if score is None and logprobs else score
    if tokens == 0:
        score = -math.inf
    seed = _number(fields, "seed", name)
    return Response(
        _VERDICTS[verdict],
        None if answer is None else str(answer),
        score,
        0 if seed is None else int(seed),
        text or "",
        None if tokens is None else int(tokens),
    )


def _text(fields: Mapping[str, Any], field: str, of: str = "it") -> str | None:
    value = fields.get(field)
    if value is not None and not isinstance(value, str):
        raise _MalformedLine(f"{of}: {field} must be text, not {value!r:.40}")
    return value


def _number(fields: Mapping[str, Any], field: str, of: str) -> float | None:
    value = fields.get(field)
    if value is not None and not _is_number(value):
        raise _MalformedLine(f"{of}: {field} must be a finite number, not {value!r:.40}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
