"""What the service does with a request, whatever its shape: bound it, let it in, answer it, count it.

Invariant: a question is worked on only between its admission and its end; when its client goes away, so does its work.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

from aft_ray.config.serve import ServeConfig
from aft_ray.inference.request_parameters import PromptTooLong, SamplingSpec, response_room
from aft_ray.serving.api.admission import Admission, Keys
from aft_ray.serving.api.requests import ChatRequest, CompletionRequest, ReasonRequest, Refusal
from aft_ray.serving.api.responses import Answer, Opening
from aft_ray.serving.engine.client import BadRequest
from aft_ray.serving.examples import examples
from aft_ray.serving.model import ServedModel
from aft_ray.serving.reasoning import EngineUnavailable, Reasoned, Reasoning, ReasoningRequest, Scored, TooLate
from aft_ray.serving.telemetry import Record, Telemetry
from aft_ray.storage.records import Question
from aft_ray.tasks import Task, build_tasks
from aft_ray.tasks.dataset import load_tokenizer
from aft_ray.tasks.rendering import render_prompt

# Seconds a client is told to wait when no engine answers.
_RETRY_AFTER_S = 5.0


class Service:
    """One reasoner's work. `engines` is the handle of the policy servers."""

    def __init__(self, config: ServeConfig, served: ServedModel, engines: Any) -> None:
        self.config = config
        self.served = served
        self.keys = Keys(config.access)
        self.tasks: Mapping[str, Task] = build_tasks(served.run)
        self.examples = {name: examples(served.run, name) for name in self.tasks}
        self.telemetry = Telemetry(config.access.log_questions)
        self._tokenizer = load_tokenizer(served.run)
        self._reasoning = Reasoning(engines, self._tokenizer)
        self._admission = Admission(config.limits)
        self._last_version: int | None = None

    # ── from requests to questions ───────────────────────────────────────────────────────────────────────────────

    def reason_ask(self, request: ReasonRequest, record: Record) -> ReasoningRequest:
        self.check_model(request.model)
        record.asked(request.question)
        task = self._task(request.task)
        return self._ask(request, self._render(task, request.question, "question"), task, 1)

    def chat_ask(self, request: ChatRequest, record: Record) -> ReasoningRequest:
        """The question is the last message, put as the task puts it. What comes before it reaches the model only
        through a chat template: a model without one was not trained on conversations."""
        self.check_model(request.model)
        *before, last = request.messages
        record.asked(last.text)
        task = self._task(request.task)
        turns = [{"role": message.role, "content": message.text} for message in before]
        prompt = self._render(task, last.text, "messages", turns)
        return self._ask(request, prompt, task, request.choices, request.max_completion_tokens)

    def completion_asks(self, request: CompletionRequest, record: Record) -> list[ReasoningRequest]:
        self.check_model(request.model)
        task = self._task(request.task)
        prompts = request.prompts
        if not prompts or len(prompts) > self.config.limits.concurrency:
            raise Refusal(400, f"prompt must be 1 to {self.config.limits.concurrency} prompts", param="prompt")
        asks = []
        for prompt in prompts:
            record.asked(prompt if isinstance(prompt, str) else f"{len(prompt)} tokens")
            if isinstance(prompt, str):
                self._check_length(prompt, "prompt")
                token_ids = render_prompt(prompt, self._tokenizer, "never")
            else:
                token_ids = prompt
                if not token_ids or not all(0 <= token < len(self._tokenizer) for token in token_ids):
                    raise Refusal(
                        400, f"prompt has tokens that are not in 0 to {len(self._tokenizer) - 1}", param="prompt"
                    )
            asks.append(self._ask(request, token_ids, task, request.choices))
        return asks

    def _ask(
        self,
        request: ReasonRequest | ChatRequest | CompletionRequest,
        prompt: list[int],
        task: Task,
        choices: int,
        max_completion_tokens: int | None = None,
    ) -> ReasoningRequest:
        defaults, limits = self.config.answering, self.config.limits
        temperature = defaults.temperature if request.temperature is None else request.temperature
        strategy = request.strategy or (defaults.strategy if temperature else "greedy")
        if strategy == "greedy":
            temperature = 0.0
        elif not temperature:
            raise Refusal(400, f"strategy={strategy} needs a temperature above 0", param="temperature")
        asked = request.candidates
        n = asked or (1 if strategy == "greedy" else max(defaults.n, choices))
        if strategy == "greedy" and max(n, choices) > 1:
            raise Refusal(400, "strategy=greedy, or temperature=0, has one response; leave n out", param="n")
        if n < choices:
            raise Refusal(400, f"{choices} choices need as many candidates; best_of is {n}", param="best_of")
        max_tokens = max_completion_tokens or request.max_tokens or defaults.max_tokens
        for name, value, most in (("n", n, limits.n), ("max_tokens", max_tokens, limits.max_tokens)):
            if value > most:
                said = request.names.get(name, name)
                raise Refusal(400, f"{said} ({value}) is more than this service takes, {most}", param=said)
        try:
            response_room(len(prompt), self.served.run.model.max_length)
        except PromptTooLong as error:
            raise Refusal(400, str(error), param=request.asked_in, code="context_length_exceeded") from error
        return ReasoningRequest(
            prompt_token_ids=prompt,
            task=task,
            strategy=strategy,
            n=n,
            how=SamplingSpec(1, temperature, request.top_p or defaults.top_p, max_tokens),
            seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
            stop_confidence=request.stop_confidence or defaults.stop_confidence,
            at_least=choices,
        )

    def check_model(self, name: str | None) -> None:
        """Raises Refusal (404) for another model than the one served."""
        if name is not None and name != self.served.name:
            raise Refusal(
                404, f"the model {name!r} is not served here; {self.served.name!r} is", "not_found_error", "model",
                "model_not_found",
            )  # fmt: skip

    def _task(self, name: str | None) -> Task:
        if name is None:
            return next(iter(self.tasks.values()))
        if name not in self.tasks:
            raise Refusal(400, f"the model has no task {name!r}; it has {', '.join(self.tasks)}", param="task")
        return self.tasks[name]

    def _check_length(self, text: str, param: str) -> None:
        most = self.config.limits.question_chars
        if len(text) > most:
            raise Refusal(400, f"{param} has {len(text)} characters; at most {most} are taken", param=param)

    def _render(self, task: Task, text: str, param: str, before: Sequence[Mapping[str, str]] = ()) -> list[int]:
        self._check_length(text, param)
        question = Question(id="", text=text, reference="", gold="", task=task.name)
        return render_prompt(task.prompt(question), self._tokenizer, self.served.run.model.chat_template, before)

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.asynccontextmanager
    async def admitted(self) -> AsyncIterator[float]:
        """Yields the seconds waited. Raises Refusal when too many are waiting."""
        async with self._admission.enter(self.config.limits.deadline_s) as queued_s:
            self.telemetry.inside(self._admission.inside)
            try:
                yield queued_s
            finally:
                self.telemetry.inside(self._admission.inside - 1)

    async def answer(self, ask: ReasoningRequest, record: Record) -> Answer:
        """Admits and answers. Raises Refusal."""
        async with self.admitted() as queued_s:
            with refusals():
                reasoned = await self._reasoning.reason(ask, self._left(queued_s))
            return self._done(ask, reasoned, queued_s, record)

    async def answer_all(self, asks: Sequence[ReasoningRequest], record: Record) -> list[Answer]:
        """Several at once, each admitted by itself; one that is refused ends the others. Raises Refusal."""
        answering = [asyncio.ensure_future(self.answer(ask, record)) for ask in asks]
        try:
            return list(await asyncio.gather(*answering))
        finally:
            for one in answering:
                one.cancel()

    async def candidates(
        self, ask: ReasoningRequest, queued_s: float, record: Record, alive_every_s: float
    ) -> AsyncGenerator[Scored | Answer | None, None]:
        """Each candidate as it is finished, then the answer; None every so often while nothing comes.

        For an admitted question.
        """
        arrived: asyncio.Queue[Scored] = asyncio.Queue()
        working = asyncio.ensure_future(self._reasoning.reason(ask, self._left(queued_s), arrived.put_nowait))
        try:
            while not (working.done() and arrived.empty()):
                next_one = asyncio.ensure_future(arrived.get())
                await asyncio.wait({working, next_one}, timeout=alive_every_s, return_when=asyncio.FIRST_COMPLETED)
                if next_one.done():
                    yield next_one.result()
                    continue
                next_one.cancel()
                if not working.done():
                    yield None
            with refusals():
                reasoned = await working
            yield self._done(ask, reasoned, queued_s, record)
        finally:
            working.cancel()

    async def spoken(
        self, ask: ReasoningRequest, queued_s: float, record: Record
    ) -> AsyncGenerator[str | Answer, None]:
        """The text of a single response as it is generated, then the answer. For an admitted question."""
        with refusals():
            async with contextlib.aclosing(self._reasoning.stream(ask, self._left(queued_s))) as parts:
                async for part in parts:
                    yield part if isinstance(part, str) else self._done(ask, part, queued_s, record)

    async def version(self) -> int | None:
        """Policy version of an engine. Raises Refusal (503) when none answers."""
        with refusals():
            self._last_version = await self._reasoning.version()
        return self._last_version

    async def last_version(self) -> int | None:
        """The same, or what was last seen of it when no engine answers."""
        with contextlib.suppress(Refusal):
            await self.version()
        return self._last_version

    def opening(self, record: Record) -> Opening:
        return Opening(record.id, int(time.time()), self.served.name)

    def _done(self, ask: ReasoningRequest, reasoned: Reasoned, queued_s: float, record: Record) -> Answer:
        total_s = queued_s + reasoned.sampling_s
        answer = Answer(record.id, int(time.time()), self.served.name, ask, reasoned, queued_s, total_s)
        self._last_version = reasoned.version
        self.telemetry.answered(answer)
        record.answered(answer)
        return answer

    def _left(self, queued_s: float) -> float:
        return max(0.001, self.config.limits.deadline_s - queued_s)


@contextlib.contextmanager
def refusals() -> Any:
    """What can go wrong with a question, as HTTP says it."""
    try:
        yield
    except BadRequest as error:
        raise Refusal(400, str(error)) from error
    except TooLate as error:
        raise Refusal(504, str(error), "timeout_error", None, "deadline") from error
    except EngineUnavailable as error:
        raise Refusal(503, str(error), "server_error", None, "engine_unavailable", _RETRY_AFTER_S) from error
