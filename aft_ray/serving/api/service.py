"""The service behind the routes: turns a request of any API into a question, admits it, answers it and counts it.

Invariant: work on a question begins after its admission, and ends at once when its client closes the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from aft_ray.config.serve import ServeConfig
from aft_ray.inference.request_parameters import PromptTooLong, SamplingSpec, response_room
from aft_ray.serving.api.admission import AdmissionQueue
from aft_ray.serving.api.api_keys import ApiKeys
from aft_ray.serving.api.errors import ApiError
from aft_ray.serving.api.requests import ChatRequest, CompletionRequest, ReasonRequest
from aft_ray.serving.api.responses import Answer, AnswerHeader
from aft_ray.serving.api.telemetry import RequestRecord, Telemetry
from aft_ray.serving.engine.client import BadRequest
from aft_ray.serving.examples import example_questions
from aft_ray.serving.model import ServedModel
from aft_ray.serving.reasoning import (
    DeadlineExceeded,
    EngineUnavailable,
    ReasoningPipeline,
    ReasoningRequest,
    ReasoningResult,
    ScoredCandidate,
)
from aft_ray.storage.records import Question
from aft_ray.tasks import Task, build_tasks
from aft_ray.tasks.chat_template import Message, TemplateRefusal
from aft_ray.tasks.dataset import load_tokenizer
from aft_ray.tasks.rendering import Renderer

# Seconds after which a client is told to try again when no engine answers.
_RETRY_AFTER_S = 5.0


class Service:
    """The service of one reasoner process. `engines` is the Serve handle of the policy servers."""

    def __init__(self, config: ServeConfig, served: ServedModel, engines: Any) -> None:
        self.config = config
        self.served = served
        self.api_keys = ApiKeys(config.access)
        self.tasks: Mapping[str, Task] = build_tasks(served.run)
        self.examples = {name: example_questions(served.run, name) for name in self.tasks}
        self.telemetry = Telemetry(config.access.log_questions)
        self._tokenizer = load_tokenizer(served.run)
        self._renderer = Renderer(served.run, self._tokenizer)
        self._pipeline = ReasoningPipeline(engines, self._renderer.text)
        self._admission = AdmissionQueue(config.limits)
        self._last_version: int | None = None

    # ── From requests to questions ───────────────────────────────────────────────────────────────────────────────

    def prepare_reason(self, request: ReasonRequest, record: RequestRecord) -> ReasoningRequest:
        """Returns the question of a request of our own API. Raises ApiError if it cannot be answered as requested."""
        self.check_model(request.model)
        record.add_question(request.question)
        task = self._task(request.task)
        return self._prepare(request, self._tokenize(task, request.question, "question"), task, 1)

    def prepare_chat(self, request: ChatRequest, record: RequestRecord) -> ReasoningRequest:
        """Returns the question of a chat: its last message, in the task's prompt template.

        Earlier messages are passed to the model only through a chat template, since a model without one was not trained
        on conversations. Raises ApiError if the question cannot be answered as requested.
        """
        self.check_model(request.model)
        *earlier, last = request.messages
        record.add_question(last.text)
        task = self._task(request.task)
        history = [{"role": message.role, "content": message.text} for message in earlier]
        prompt = self._tokenize(task, last.text, "messages", history)
        return self._prepare(request, prompt, task, request.choices, request.max_completion_tokens)

    def prepare_completions(self, request: CompletionRequest, record: RequestRecord) -> list[ReasoningRequest]:
        """Returns the prompts of a completion, unchanged. Raises ApiError if they cannot be answered as requested."""
        self.check_model(request.model)
        task = self._task(request.task)
        prompts = request.prompts
        if not prompts or len(prompts) > self.config.limits.concurrency:
            raise ApiError(400, f"prompt must hold 1 to {self.config.limits.concurrency} prompts", param="prompt")
        prepared = []
        for prompt in prompts:
            record.add_question(prompt if isinstance(prompt, str) else f"{len(prompt)} tokens")
            if isinstance(prompt, str):
                self._check_length(prompt, "prompt")
                token_ids = self._renderer.completion(prompt)
            else:
                token_ids = prompt
                if not token_ids or not all(0 <= token < len(self._tokenizer) for token in token_ids):
                    raise ApiError(
                        400, f"prompt has tokens that are not in 0 to {len(self._tokenizer) - 1}", param="prompt"
                    )
            prepared.append(self._prepare(request, token_ids, task, request.choices))
        return prepared

    def _prepare(
        self,
        request: ReasonRequest | ChatRequest | CompletionRequest,
        prompt: list[int],
        task: Task,
        choices: int,
        max_completion_tokens: int | None = None,
    ) -> ReasoningRequest:
        """Fills in the configured defaults and checks the service's limits. `choices`: responses to return."""
        defaults, limits = self.config.answering, self.config.limits
        temperature = defaults.temperature if request.temperature is None else request.temperature
        strategy = request.strategy or (defaults.strategy if temperature else "greedy")
        if strategy == "greedy":
            temperature = 0.0
        elif not temperature:
            raise ApiError(400, f"strategy={strategy} needs a temperature above 0", param="temperature")
        n = request.candidates or (1 if strategy == "greedy" else max(defaults.n, choices))
        if strategy == "greedy" and max(n, choices) > 1:
            raise ApiError(400, "strategy=greedy and temperature=0 give one response; leave n out", param="n")
        if n < choices:
            raise ApiError(
                400, f"{choices} choices need at least {choices} candidates; best_of is {n}", param="best_of"
            )
        max_tokens = max_completion_tokens or request.max_tokens or defaults.max_tokens
        for name, value, most in (("n", n, limits.n), ("max_tokens", max_tokens, limits.max_tokens)):
            if value > most:
                field = request.client_names.get(name, name)
                raise ApiError(400, f"{field} ({value}) is more than this service takes, {most}", param=field)
        try:
            response_room(len(prompt), self.served.run.model.max_length)
        except PromptTooLong as error:
            raise ApiError(400, str(error), param=request.question_field, code="context_length_exceeded") from error
        return ReasoningRequest(
            prompt_token_ids=prompt,
            task=task,
            strategy=strategy,
            n=n,
            sampling=SamplingSpec(1, temperature, request.top_p or defaults.top_p, max_tokens),
            seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
            stop_confidence=request.stop_confidence or defaults.stop_confidence,
            min_candidates=choices,
        )

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for another model than the one that is served."""
        if name is not None and name != self.served.name:
            raise ApiError(
                404, f"the model {name!r} is not served here; {self.served.name!r} is", "not_found_error", "model",
                "model_not_found",
            )  # fmt: skip

    def _task(self, name: str | None) -> Task:
        if name is None:
            return next(iter(self.tasks.values()))
        if name not in self.tasks:
            raise ApiError(400, f"the model has no task {name!r}; it has {', '.join(self.tasks)}", param="task")
        return self.tasks[name]

    def _check_length(self, text: str, param: str) -> None:
        most = self.config.limits.question_chars
        if len(text) > most:
            raise ApiError(400, f"{param} has {len(text)} characters; at most {most} are taken", param=param)

    def _tokenize(self, task: Task, text: str, param: str, history: Sequence[Message] = ()) -> list[int]:
        """Returns the token ids of a question in the task's prompt template, after earlier messages of a chat."""
        self._check_length(text, param)
        question = Question(id="", text=text, reference="", gold="", task=task.name)
        try:
            return self._renderer.prompt(task.prompt(question), history)
        except TemplateRefusal as error:
            raise ApiError(400, f"{param}: {error}", param=param) from error

    # ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.asynccontextmanager
    async def admit(self) -> AsyncIterator[float]:
        """Holds a slot for a question while the context is open; yields the seconds that the question waited for it.

        Raises ApiError (429 or 504) if there is no slot.
        """
        async with self._admission.admit(self.config.limits.deadline_s) as queued_s:
            self.telemetry.set_in_progress(self._admission.in_progress)
            try:
                yield queued_s
            finally:
                self.telemetry.set_in_progress(self._admission.in_progress - 1)

    async def answer(self, question: ReasoningRequest, record: RequestRecord) -> Answer:
        """Admits and answers a question. Raises ApiError."""
        async with self.admit() as queued_s:
            with api_errors():
                result = await self._pipeline.reason(question, self._remaining_s(queued_s))
            return self._finish(question, result, queued_s, record)

    async def answer_all(self, questions: Sequence[ReasoningRequest], record: RequestRecord) -> list[Answer]:
        """Answers several questions at once, each with a slot of its own. Raises ApiError when one of them fails."""
        answers = [asyncio.ensure_future(self.answer(question, record)) for question in questions]
        try:
            return list(await asyncio.gather(*answers))
        finally:
            for answer in answers:
                answer.cancel()

    async def stream_candidates(
        self, question: ReasoningRequest, queued_s: float, record: RequestRecord, keep_alive_s: float
    ) -> AsyncGenerator[ScoredCandidate | Answer | None, None]:
        """Yields each candidate of an admitted question as it is finished, then the answer.

        Args:
            question: the question.
            queued_s: seconds that it waited for its slot.
            record: the request's record.
            keep_alive_s: seconds without a candidate after which None is yielded.

        Raises:
            ApiError: the question could not be answered.
        """
        finished: asyncio.Queue[ScoredCandidate] = asyncio.Queue()
        reasoning = asyncio.ensure_future(
            self._pipeline.reason(question, self._remaining_s(queued_s), finished.put_nowait)
        )
        try:
            while not (reasoning.done() and finished.empty()):
                next_candidate = asyncio.ensure_future(finished.get())
                await asyncio.wait(
                    {reasoning, next_candidate}, timeout=keep_alive_s, return_when=asyncio.FIRST_COMPLETED
                )
                if next_candidate.done():
                    yield next_candidate.result()
                    continue
                next_candidate.cancel()
                if not reasoning.done():
                    yield None
            with api_errors():
                result = await reasoning
            yield self._finish(question, result, queued_s, record)
        finally:
            reasoning.cancel()

    async def stream_text(
        self, question: ReasoningRequest, queued_s: float, record: RequestRecord
    ) -> AsyncGenerator[str | Answer, None]:
        """Yields the text of an admitted question's single response as it is generated, then the answer.

        Raises ApiError if the question could not be answered.
        """
        with api_errors():
            async with contextlib.aclosing(self._pipeline.stream(question, self._remaining_s(queued_s))) as parts:
                async for part in parts:
                    yield part if isinstance(part, str) else self._finish(question, part, queued_s, record)

    async def version(self) -> int | None:
        """Returns the policy version of an engine. Raises ApiError (503) if none answers."""
        with api_errors():
            self._last_version = await self._pipeline.version()
        return self._last_version

    async def last_version(self) -> int | None:
        """Returns the policy version of an engine, or the last one known if no engine answers."""
        with contextlib.suppress(ApiError):
            await self.version()
        return self._last_version

    def answer_header(self, record: RequestRecord) -> AnswerHeader:
        return AnswerHeader(record.id, int(time.time()), self.served.name)

    def _finish(
        self, question: ReasoningRequest, result: ReasoningResult, queued_s: float, record: RequestRecord
    ) -> Answer:
        total_s = queued_s + result.sampling_s
        answer = Answer(record.id, int(time.time()), self.served.name, question, result, queued_s, total_s)
        self._last_version = result.version
        self.telemetry.count_answer(answer)
        record.add_answer(answer)
        return answer

    def _remaining_s(self, queued_s: float) -> float:
        return max(0.001, self.config.limits.deadline_s - queued_s)


@contextlib.contextmanager
def api_errors() -> Iterator[None]:
    """Raises the errors of reasoning as ApiError."""
    try:
        yield
    except BadRequest as error:
        raise ApiError(400, str(error)) from error
    except DeadlineExceeded as error:
        raise ApiError(504, str(error), "timeout_error", None, "deadline") from error
    except EngineUnavailable as error:
        raise ApiError(503, str(error), "server_error", None, "engine_unavailable", _RETRY_AFTER_S) from error
