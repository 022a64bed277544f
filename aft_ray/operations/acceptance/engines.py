"""Acceptance checks of the real vLLM engine alone: its scores, a weight update in place, and sleeping.

They use `inference.Engine` as a sampler does. The expected scores are those of transformers in float32 on the CPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aft_ray.operations.acceptance.models import EOS, write_random_model
from aft_ray.operations.acceptance.outcome import Figure
from aft_ray.planning.plan.architecture import Architecture
from aft_ray.planning.plan.quantities import GB

# Heads of 64 run on the CPU and on every GPU.
_MODEL = Architecture("random", "llama", layers=2, hidden=128, intermediate=256, heads=2, kv_heads=2, vocabulary=128,
                      context=160, head_size=64)  # fmt: skip
_PROMPT = [7, 8, 9, 10, 11, 12]
_RESPONSE_TOKENS = 32
_TIMEOUT_S = 300.0
# Nats per token: the weights of the two models are far further apart than that.
_BFLOAT16_LIMIT, _FLOAT32_LIMIT = 0.02, 1e-4
# GB that a sleeping engine may keep on its GPU: CUDA's context and vLLM's graphs.
_ASLEEP_LIMIT = 4.0


def engine_scores() -> list[Figure]:
    """The engine scores its own greedy response as transformers does, before and after a weight update in place."""
    with _models() as (before, after), _engine(before, can_sleep=False) as engine:
        first = _difference(engine, before)
        _load(engine, after)
        second = _difference(engine, after)
        stale = _difference(engine, before)
        limit = _limit()
        return [
            Figure("scores off transformers' by", first, "nats per token", limit),
            Figure("after an update off by", second, "nats per token", limit),
            Figure("the old weights would be off by", stale, "nats per token"),
        ]


def engine_sleep() -> list[Figure]:
    """A sleeping engine gives its memory back; woken with the same weights it answers as before."""
    import torch

    gpu = torch.cuda.is_available()

    def used() -> float:
        free, total = torch.cuda.mem_get_info() if gpu else (0, 0)
        return (total - free) / GB

    with _models() as (directory, _):
        empty = used()
        with _engine(directory, can_sleep=gpu) as engine:
            before = _greedy(engine)
            awake = used() - empty
            engine.sleep().result(_TIMEOUT_S)
            asleep = used() - empty
            _load(engine, directory)
            after, woken = _greedy(engine), used() - empty
    same = Figure("tokens that differ after waking", sum(a != b for a, b in zip(before, after, strict=True)), limit=0)
    if not gpu:
        return [same, Figure("memory", "not measured: vLLM frees none on a CPU")]
    return [
        same,
        Figure("memory awake", awake, "GB"),
        Figure("asleep", asleep, "GB", _ASLEEP_LIMIT),
        Figure("woken", woken, "GB"),
    ]


@contextlib.contextmanager
def _models() -> Iterator[tuple[Path, Path]]:
    """Two models with different weights."""
    with TemporaryDirectory(prefix="aft_ray-acceptance-") as place:
        one, other = (write_random_model(Path(place) / str(seed), _MODEL, "cpu", 0.2, seed) for seed in (1, 2))
        yield one, other


@contextlib.contextmanager
def _engine(directory: Path, can_sleep: bool) -> Iterator[Any]:
    import torch

    from aft_ray.inference.engine import Engine
    from aft_ray.inference.engine_spec import EngineSpec

    # This process has used CUDA, so vLLM's processes must not be forked from it.
    os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"
    gpu = torch.cuda.is_available()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    engine = Engine(
        EngineSpec(
            str(directory),
            (EOS,),
            "bfloat16" if gpu else "float32",
            _MODEL.context,
            32,
            gpu=gpu,
            kv_cache_gib=0.25,
            gpu_memory_utilization=0.5,
            shared_gpus=(first,) if can_sleep else (),
        ),
        _TIMEOUT_S,
    )
    try:
        yield engine
    finally:
        engine.close()


def _load(engine: Any, directory: Path) -> None:
    """Loads weights from a model directory; a sleeping engine wakes up."""
    from aft_ray.weights.receive_plan import FromDirectory

    files = tuple(path.name for path in sorted(directory.glob("*.safetensors")))
    plan = FromDirectory(str(directory), files)
    engine.update_weights(plan.calls(_TIMEOUT_S), lambda phase: None).result(_TIMEOUT_S)


def _greedy(engine: Any) -> list[int]:
    """The tokens of the greedy response; of always the same number, because end-of-sequence may not end it."""
    return list(_greedy_candidate(engine).token_ids)


def _greedy_candidate(engine: Any) -> Any:
    from aft_ray.inference.request_parameters import Prompt, SamplingSpec

    greedy = SamplingSpec(k=1, temperature=0.0, top_p=1.0, max_tokens=_RESPONSE_TOKENS)
    (candidate,) = engine.sample(Prompt(_PROMPT, 5), greedy).result(_TIMEOUT_S)
    return candidate


def _difference(engine: Any, directory: Path) -> float:
    """How far the engine's score of its greedy response is from transformers' with the weights of a directory."""
    import torch
    from transformers import AutoModelForCausalLM

    candidate = _greedy_candidate(engine)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([_PROMPT + list(candidate.token_ids)])).logits[0].log_softmax(-1)
    scores = [logprobs[len(_PROMPT) + index - 1, token] for index, token in enumerate(candidate.token_ids)]
    return abs(float(candidate.score) - float(torch.stack(scores).mean()))


def _limit() -> float:
    import torch

    return _BFLOAT16_LIMIT if torch.cuda.is_available() else _FLOAT32_LIMIT
