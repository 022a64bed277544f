"""The one door to vLLM: an engine stepped by a thread of its own, so that calls overlap in its continuous batch.

Invariant: a request is answered wholly by one set of weights. Weights change only when no request is running;
requests that arrive meanwhile wait. An exception inside vLLM kills the engine for good (`EngineDead`): it is never
used again, because its state is unknown.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, get_args

from aft_ray.config.run import LoraConfig
from aft_ray.storage.records import Candidate
from aft_ray.weights.adapter import adapter_request
from aft_ray.weights.receive_plan import GLOO, NCCL, RECOVERABLE_PHASES, EngineCall, Phase

# Seconds between two looks at whether the processes of an idle engine still live.
_HEALTH_S = 5.0


class NoRoom(ValueError):
    """A prompt that fills the model's context."""


class EngineDead(RuntimeError):
    """vLLM failed inside this process; the process must end and be replaced."""


class WeightTransferFailed(RuntimeError):
    """New weights did not come. The engine's own are unknown now; it works again once a delivery has come through."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine is built from. `model` is a local directory or a hub name.

    eos_token_id: the token that ends a response; the engine has no tokenizer to ask. threads: of each of its processes,
    which are tensor_parallel_size x pipeline_parallel_size. shared_gpus: ids of GPUs that are train workers' when the
    engine sleeps; none: it has its own. meets: it takes new weights from the trainer's stream. lora: the adapters that
    it takes in place of new weights; None: it takes none.
    """

    model: str
    eos_token_id: int
    dtype: str
    max_length: int
    max_num_seqs: int
    gpu: bool
    threads: int = 1
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.9
    trust_remote_code: bool = False
    seed: int = 0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    shared_gpus: tuple[str, ...] = ()
    joins_broadcast: bool = False
    lora: LoraConfig | None = None

    @property
    def executor(self) -> Literal["uni", "mp", "ray"]:
        """vLLM's way to run the engine's processes: in this one, as its children, or as Ray actors on several nodes."""
        if self.tensor_parallel_size * self.pipeline_parallel_size == 1:
            return "uni"
        return "ray" if self.gpu and self.pipeline_parallel_size > 1 else "mp"


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How the candidates of a question are drawn. temperature 0 is greedy; scores are always at temperature 1."""

    k: int
    temperature: float
    top_p: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question as the engine sees it; `seed` fixes its candidates."""

    token_ids: list[int]
    seed: int


def prepare_environment(spec: EngineSpec) -> None:
    """Sets what vLLM reads from the environment; must run before vllm is imported in this process."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.update(engine_environment(spec))
    if spec.shared_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(spec.shared_gpus)
    if not spec.gpu or spec.executor == "ray":
        # vLLM's core then runs in this process: as a process of its own it would join Ray as another job.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    """The environment variables that a process with such an engine needs."""
    if spec.gpu:
        return {}
    return {
        "VLLM_CPU_CI_ENV": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(spec.kv_cache_gib))),
        # vLLM would pin every engine of a machine to the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(spec.threads),
        # Otherwise the first request that asks for log-probs compiles for half a minute.
        "TORCH_COMPILE_DISABLE": "1",
    }


class Engine:
    """A running vLLM engine. Thread-safe."""

    def __init__(self, spec: EngineSpec, start_timeout_s: float = 900) -> None:
        """Blocks until the engine is ready. Raises EngineDead with vLLM's reason when it cannot start."""
        self._spec = spec
        self._tasks: queue.Queue[_Task] = queue.Queue()
        self._running: dict[str, tuple[Future[Any], Callable[[Any], Any]]] = {}
        self._failure: BaseException | None = None
        self._ending = threading.Lock()
        self._next_id = 0
        self._adapter: Any = None  # what vLLM calls a LoRARequest; all requests carry it
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(started,), name="vllm-engine", daemon=True)
        self._thread.start()
        try:
            started.result(start_timeout_s)
        except TimeoutError:
            raise EngineDead(f"vLLM did not start {spec.model} within {start_timeout_s:.0f} s") from None

    def sample(self, prompt: Prompt, how: SamplingSpec) -> Future[list[Candidate]]:
        """k unlabelled candidates. Raises NoRoom."""
        room = response_room(len(prompt.token_ids), self._spec.max_length)
        params = request_parameters(prompt, how, min(how.max_tokens, room), self._spec.eos_token_id)
        return self._request(prompt.token_ids, params, candidates_of)

    def score(self, prompt_token_ids: Sequence[int], response_token_ids: Sequence[int]) -> Future[float]:
        """Mean token log-probability of a response under the engine's present weights, nats per token."""
        sequence = [*prompt_token_ids, *response_token_ids]
        return self._request(sequence, scoring_parameters(), lambda output: score_of(output, len(prompt_token_ids)))

    def update_weights(
        self, calls: Iterator[EngineCall], enter: Callable[[Phase], None], adapter: int = 0
    ) -> Future[None]:
        """Makes the calls of a delivery, once no request is running; says which phase it enters.

        adapter: the number of the adapter that they bring, which all requests then carry; 0: none.
        The prefix cache, computed with the old weights, is dropped. Raises WeightTransferFailed when the weights did not come;
        what fails later kills the engine.
        """

        def update(llm: Any) -> WeightTransferFailed | None:
            enter("fetch")
            phase: Phase = "fetch"
            try:
                for call in calls:
                    enter(phase := call.phase)
                    llm.collective_rpc(call.method, args=call.args)
            except Exception as error:
                if phase not in RECOVERABLE_PHASES:
                    raise
                # The first line: torch writes its stack frames after it.
                return WeightTransferFailed((str(error).strip() or repr(error)).splitlines()[0])
            if not llm.reset_prefix_cache():
                raise RuntimeError("the prefix cache could not be reset after new weights were loaded")
            self._adapter = adapter_request(adapter) if adapter else None
            return None

        return self._exclusive(update)

    def sleep(self) -> Future[Any]:
        """Gives the memory of weights and KV cache back. Both parts must wake, the weights loaded, before a request.

        On the CPU vLLM does nothing but stop its scheduler.
        """
        return self._exclusive(lambda llm: llm.sleep(level=2))

    def wake(self, part: Literal["weights", "kv_cache"]) -> Future[Any]:
        """Takes the memory of one part again; nothing happens to one that is awake."""

        def wake(llm: Any) -> None:
            if llm.is_sleeping():
                llm.wake_up([part])

        return self._exclusive(wake)

    def alive(self) -> bool:
        return self._failure is None and self._thread.is_alive()

    def close(self) -> None:
        """Ends the engine once its running requests are answered."""
        if self.alive():
            self._tasks.put(_Task(None, Future(), exclusive=True))
        self._thread.join()

    # --- the engine's thread

    def _request(self, token_ids: Sequence[int], params: Any, convert: Callable[[Any], Any]) -> Future[Any]:
        answer: Future[Any] = Future()

        def add(llm: Any) -> None:
            request_id = str(self._next_id)
            self._next_id += 1
            llm.add_request(request_id, {"prompt_token_ids": list(token_ids)}, params, lora_request=self._adapter)
            self._running[request_id] = answer, convert

        return self._put(_Task(add, answer, exclusive=False))

    def _exclusive(self, function: Callable[[Any], Any]) -> Future[Any]:
        return self._put(_Task(function, Future(), exclusive=True))

    def _put(self, task: _Task) -> Future[Any]:
        # Under the lock, or a task could arrive after the engine's last look at its queue and wait for ever.
        with self._ending:
            if not self.alive():
                raise EngineDead(f"the vLLM engine of {self._spec.model} is dead: {self._failure}")
            # From here on it cannot be cancelled: the engine's thread answers it whether or not anyone still waits.
            task.answer.set_running_or_notify_cancel()
            self._tasks.put(task)
        return task.answer

    def _work(self, started: Future[None]) -> None:
        try:
            llm = _build(self._spec)
        except BaseException as error:
            self._failure = error
            started.set_exception(EngineDead(f"vLLM could not start {self._spec.model}: {error}"))
            return
        started.set_result(None)
        task: _Task | None = None
        try:
            while True:
                idle = not llm.has_unfinished_requests()
                task = task or self._next_task(wait=idle)
                if task is None and idle:
                    llm.collective_rpc("check_health")  # raises when a process of the engine has ended
                    continue
                if task is not None and (idle or not task.exclusive):
                    if task.function is None:
                        break
                    self._run(task, llm)
                    task = None
                    continue
                for output in llm.step():
                    if output.finished:
                        answer, convert = self._running.pop(output.request_id)
                        answer.set_result(convert(output))
            self._fail_all(task, RuntimeError("it was closed"))
        except BaseException as error:
            self._fail_all(task, error)

    def _next_task(self, wait: bool) -> _Task | None:
        try:
            return self._tasks.get(block=wait, timeout=_HEALTH_S)
        except queue.Empty:
            return None

    def _run(self, task: _Task, llm: Any) -> None:
        from vllm.exceptions import VLLMValidationError

        assert task.function is not None
        try:
            result = task.function(llm)
        except VLLMValidationError as error:
            # vLLM's word for a request it cannot take; the engine is untouched.
            task.answer.set_exception(ValueError(str(error)))
            return
        if isinstance(result, Exception):  # a failure that leaves the engine sound
            task.answer.set_exception(result)
        elif task.exclusive:
            task.answer.set_result(result)

    def _fail_all(self, task: _Task | None, failure: BaseException) -> None:
        with self._ending:
            self._failure = failure
            waiting = [*(answer for answer, _ in self._running.values()), *([task.answer] if task else [])]
            while not self._tasks.empty():
                waiting.append(self._tasks.get().answer)
        for answer in waiting:
            if not answer.done():
                answer.set_exception(EngineDead(f"the vLLM engine of {self._spec.model} died: {failure!r}"))


@dataclass(slots=True)
class _Task:
    """Work for the engine's thread: a request to add, or an exclusive call that waits until none is running."""

    function: Callable[[Any], Any] | None
    answer: Future[Any]
    exclusive: bool


def response_room(prompt_tokens: int, max_length: int) -> int:
    """Tokens that a prompt leaves for the response in a context of `max_length`. Raises NoRoom when there are none."""
    if prompt_tokens >= max_length:
        raise NoRoom(
            f"the question has {prompt_tokens} tokens as a prompt, which leaves no room for a response in the model's "
            f"context of {max_length}"
        )
    return max_length - prompt_tokens


def request_parameters(prompt: Prompt, how: SamplingSpec, max_tokens: int, eos_token_id: int) -> Any:
    """vLLM's own parameters for the k candidates of a question."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=how.k,
        temperature=how.temperature,
        top_p=how.top_p,
        max_tokens=max_tokens,
        logprobs=0,
        seed=prompt.seed if how.temperature > 0 else None,
        stop_token_ids=[eos_token_id],
        detokenize=False,
        # Otherwise a request with n > 1 ends with the last of its candidates alone.
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def candidates_of(output: Any) -> list[Candidate]:
    """The finished candidates of one vLLM request, without texts."""
    return [
        Candidate(
            token_ids=list(completion.token_ids),
            logprob_sum=completion.cumulative_logprob,
            finish_reason=completion.finish_reason,
            text="",
        )
        for completion in sorted(output.outputs, key=lambda completion: completion.index)
    ]


def scoring_parameters() -> Any:
    """vLLM's own parameters to read the log-probs of given tokens."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)


def score_of(output: Any, prompt_length: int) -> float:
    """Mean log-prob of all tokens after the first `prompt_length`, nats per token."""
    tail = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[prompt_length:]
    return float(sum(row[token].logprob for token, row in tail) / len(tail))


def _build(spec: EngineSpec) -> Any:
    prepare_environment(spec)
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    return LLMEngine.from_engine_args(EngineArgs(**engine_arguments(spec)))


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """vLLM's own arguments for an engine."""
    arguments: dict[str, Any] = {
        "model": spec.model,
        "dtype": spec.dtype,
        "max_model_len": spec.max_length,
        "max_num_seqs": spec.max_num_seqs,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": spec.seed,
        "trust_remote_code": spec.trust_remote_code,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "pipeline_parallel_size": spec.pipeline_parallel_size,
        "distributed_executor_backend": spec.executor,
        "load_format": "safetensors",
        "worker_extension_cls": "aft_ray.inference.vllm_worker.weight_loader.WeightLoader",
        # Greedy and sampled decoding must not inherit a model's own generation_config.json.
        "generation_config": "vllm",
    }
    if spec.joins_broadcast:
        arguments |= {"weight_transfer_config": {"backend": NCCL if spec.gpu else GLOO}}
    if spec.lora is not None:
        arguments |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": _rank_of_engines(spec.lora.rank),
            # An output layer that could take an adapter cannot score a prompt: its logits are computed for one token.
            "lora_target_modules": list(spec.lora.targets),
        }
    if spec.gpu:
        arguments |= {
            "gpu_memory_utilization": spec.gpu_memory_utilization,
            "enable_sleep_mode": bool(spec.shared_gpus),
        }
    else:
        # Per-request seeds crash the CPU engine when a prompt is split over several steps.
        arguments |= {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, spec.max_length),
        }
    return arguments


def _rank_of_engines(rank: int) -> int:
    """The least rank that vLLM has room for adapters of. Raises ValueError above its highest."""
    from vllm.config.lora import MaxLoRARanks

    known: list[int] = sorted(get_args(MaxLoRARanks))
    if rank > known[-1]:
        raise ValueError(f"vLLM takes adapters up to rank {known[-1]}, not lora.rank={rank}; use another transport")
    return next(one for one in known if one >= rank)
