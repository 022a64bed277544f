"""A vLLM engine for the samplers: a thread steps it, so that concurrent calls share its continuous batch.

Invariant: a request is answered wholly by one set of weights. Weights change only while no request is running;
requests that arrive meanwhile wait. After an exception inside vLLM the state of the engine is unknown: every call
raises `EngineDead` from then on. When the process of vLLM's engine core ends, whoever waits for it is told within
seconds.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from aft_ray.cluster.compat import engine_core_ended, fail_waiting_calls, shut_down_engine
from aft_ray.inference.engine_spec import EngineSpec, engine_arguments, prepare_environment
from aft_ray.inference.request_parameters import (
    Prompt,
    RequestFailed,
    SamplingSpec,
    adapter_request,
    candidates_of,
    request_parameters,
    response_room,
    score_of,
    scoring_parameters,
)
from aft_ray.inference.versioned_engine import WeightTransferFailed, receive_weights
from aft_ray.storage.records import Candidate
from aft_ray.weights.receive_plan import EngineCall, Phase

# Seconds between two checks whether the processes of an idle engine are still alive.
_HEALTH_CHECK_INTERVAL_S = 5.0
# Seconds between two checks whether the process of a busy engine's core is still alive.
_CORE_CHECK_INTERVAL_S = 0.5


class EngineDead(RuntimeError):
    """vLLM failed inside this process, which must end and be replaced."""


class Engine:
    """A running vLLM engine. Thread-safe."""

    def __init__(self, spec: EngineSpec, start_timeout_s: float = 900) -> None:
        """Blocks until the engine is ready.

        Raises:
            EngineDead: it cannot start, with vLLM's reason, or it has not started in time.
        """
        self._spec = spec
        self._tasks: queue.Queue[_Task] = queue.Queue()
        # By vLLM's request id: the future of each running request, and what makes its result from vLLM's output.
        self._running: dict[str, tuple[Future[Any], Callable[[Any], Any]]] = {}
        self._task: _Task | None = None  # taken from the queue, and not yet done
        self._failure: BaseException | None = None
        self._lock = threading.Lock()  # held while a task is added, and while `_fail_all` empties the queue
        self._next_id = 0
        self._adapter: Any = None  # vLLM's LoRARequest of the loaded adapter, which every request carries
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run_engine, args=(started,), name="vllm-engine", daemon=True)
        self._thread.start()
        try:
            started.result(start_timeout_s)
        except TimeoutError:
            raise EngineDead(f"vLLM did not start {spec.model} within {start_timeout_s:.0f} s") from None

    def sample(self, prompt: Prompt, sampling: SamplingSpec) -> Future[list[Candidate]]:
        """The k candidates of a question, without texts and labels.

        Raises:
            PromptTooLong: the prompt leaves no room for a response.
        """
        room = response_room(len(prompt.token_ids), self._spec.max_length)
        parameters = request_parameters(prompt, sampling, min(sampling.max_tokens, room), self._spec.eos_token_ids)
        return self._request(prompt.token_ids, parameters, candidates_of)

    def score(self, prompt_token_ids: Sequence[int], response_token_ids: Sequence[int]) -> Future[float]:
        """Mean token log-probability of a response under the engine's present weights, nats per token."""
        sequence = [*prompt_token_ids, *response_token_ids]
        return self._request(sequence, scoring_parameters(), lambda output: score_of(output, len(prompt_token_ids)))

    def update_weights(
        self, calls: Iterator[EngineCall], enter_phase: Callable[[Phase], None], adapter: int = 0
    ) -> Future[None]:
        """Makes the calls of a receive plan as soon as no request is running. Wakes the engine when it sleeps.

        The future raises WeightTransferFailed when the weights did not arrive; any later failure kills the engine.

        Args:
            enter_phase: is called with each phase that begins, from the engine's thread.
            adapter: the number of the LoRA adapter that the calls bring, which later requests carry; 0: there is none.
        """

        def update(llm: Any) -> None:
            # The KV cache is allocated last, since it may leave no room for what loading needs.
            _wake(llm, "weights")
            receive_weights(llm, calls, enter_phase)
            _wake(llm, "kv_cache")
            self._adapter = adapter_request(adapter) if adapter else None

        return self._exclusive(update)

    def sleep(self) -> Future[Any]:
        """Frees the memory of weights and KV cache. The engine answers requests again after `update_weights`.

        On the CPU vLLM only stops its scheduler. The weights below an adapter are not loaded again, so an engine that
        takes adapters keeps them in host memory.
        """
        level = 2 if self._spec.lora is None else 1
        return self._exclusive(lambda llm: llm.sleep(level=level))

    def alive(self) -> bool:
        """Whether the engine's thread runs and vLLM has not failed in it."""
        return self._failure is None and self._thread.is_alive()

    def close(self) -> None:
        """Ends the engine after its running requests are answered."""
        if self.alive():
            self._tasks.put(_Task(None, Future(), exclusive=True))
        self._thread.join()

    def _request(self, token_ids: Sequence[int], parameters: Any, convert: Callable[[Any], Any]) -> Future[Any]:
        result: Future[Any] = Future()

        def add(llm: Any) -> None:
            request_id = str(self._next_id)
            self._next_id += 1
            llm.add_request(request_id, {"prompt_token_ids": list(token_ids)}, parameters, lora_request=self._adapter)
            self._running[request_id] = result, convert

        return self._put(_Task(add, result, exclusive=False))

    def _exclusive(self, function: Callable[[Any], Any]) -> Future[Any]:
        return self._put(_Task(function, Future(), exclusive=True))

    def _put(self, task: _Task) -> Future[Any]:
        # Without the lock a task could be added after `_fail_all` has emptied the queue, and would wait for ever.
        with self._lock:
            if not self.alive():
                raise EngineDead(f"the vLLM engine of {self._spec.model} is dead: {self._failure}")
            # The future can no longer be cancelled: the engine's thread sets its result whether or not anyone waits.
            task.result.set_running_or_notify_cancel()
            self._tasks.put(task)
        return task.result

    # Everything below runs in the engine's thread.

    def _run_engine(self, started: Future[None]) -> None:
        try:
            llm = _build_llm_engine(self._spec)
        except BaseException as error:
            self._failure = error
            started.set_exception(EngineDead(f"vLLM could not start {self._spec.model}: {error}"))
            return
        started.set_result(None)
        ended = threading.Event()
        threading.Thread(target=_watch_core, args=(llm, ended), name="vllm-core-watch", daemon=True).start()
        try:
            self._step_until_closed(llm)
            self._fail_all(RuntimeError("it was closed"))
        except BaseException as error:
            self._fail_all(error)
        finally:
            ended.set()
            with contextlib.suppress(Exception):  # it may be broken already
                shut_down_engine(llm)

    def _step_until_closed(self, llm: Any) -> None:
        """Runs the tasks and steps the engine, until the task without a function comes."""
        while True:
            idle = not llm.has_unfinished_requests()
            task = self._task = self._task or self._next_task(wait=idle)
            if task is None and idle:
                llm.collective_rpc("check_health")  # raises when a process of the engine has ended
                continue
            if task is not None and (idle or not task.exclusive):
                if task.function is None:
                    return
                self._run_task(task, llm)
                self._task = None
                continue
            for output in llm.step():
                if output.finished:
                    self._finish(output)

    def _finish(self, output: Any) -> None:
        """Sets the result of a request from vLLM's last output of it."""
        result, convert = self._running.pop(output.request_id)
        try:
            result.set_result(convert(output))
        except RequestFailed as error:
            result.set_exception(error)

    def _next_task(self, wait: bool) -> _Task | None:
        try:
            return self._tasks.get(block=wait, timeout=_HEALTH_CHECK_INTERVAL_S)
        except queue.Empty:
            return None

    def _run_task(self, task: _Task, llm: Any) -> None:
        from vllm.exceptions import VLLMValidationError

        assert task.function is not None
        try:
            result = task.function(llm)
        except VLLMValidationError as error:
            # vLLM refuses the request; the engine itself is not affected.
            task.result.set_exception(ValueError(str(error)))
        except WeightTransferFailed as error:
            task.result.set_exception(error)
        else:
            if task.exclusive:
                task.result.set_result(result)

    def _fail_all(self, failure: BaseException) -> None:
        with self._lock:
            self._failure = failure
            waiting = [*(result for result, _ in self._running.values()), *([self._task.result] if self._task else [])]
            while not self._tasks.empty():
                waiting.append(self._tasks.get().result)
        for result in waiting:
            if not result.done():
                result.set_exception(EngineDead(f"the vLLM engine of {self._spec.model} died: {failure!r}"))


@dataclass(slots=True)
class _Task:
    """A call for the engine's thread.

    Attributes:
        function: what to call with vLLM's engine; None: end the thread.
        result: the future of the caller. A task that is not exclusive adds a request, whose output sets the result.
        exclusive: whether the task waits until no request is running.
    """

    function: Callable[[Any], Any] | None
    result: Future[Any]
    exclusive: bool


def _wake(llm: Any, memory: str) -> None:
    """Allocates the memory of "weights" or "kv_cache" again, when the engine sleeps."""
    if llm.is_sleeping():
        llm.wake_up([memory])


def _watch_core(llm: Any, ended: threading.Event) -> None:
    """Ends the waits of the engine's thread when the process of its core has ended; returns after `ended` is set."""
    while not ended.wait(_CORE_CHECK_INTERVAL_S):
        if engine_core_ended(llm):
            fail_waiting_calls(llm)
            return


def _build_llm_engine(spec: EngineSpec) -> Any:
    prepare_environment(spec)
    from vllm import EngineArgs, LLMEngine
    from vllm.usage.usage_lib import UsageContext

    # The context of vLLM's own class for offline batches, from which it derives how much the hardware takes at once.
    return LLMEngine.from_engine_args(
        EngineArgs(**engine_arguments(spec)),
        usage_context=UsageContext.LLM_CLASS,
        enable_multiprocessing=spec.has_core_process,
    )
