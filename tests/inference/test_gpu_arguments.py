"""What engines on GPUs are started with, and what vLLM's own code makes of it on a fake CUDA platform.

No GPU is used: `cuda_config_main.py` describes a card to vLLM, whose configuration is computed as on a GPU. It runs
with the installed build, and with the pinned build for GPUs where `make check-gpu` has unpacked it.
"""

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from gpu_build import needs_gpu_build, unpacked_vllm
from tiny import LENGTH, tiny_config

from aft_ray.cluster.colocated_placement import EnginePlacement
from aft_ray.inference.engine_spec import engine_arguments, engine_environment
from aft_ray.planning.plan.engine_memory import default_max_num_seqs
from aft_ray.planning.plan.hardware import NODES
from aft_ray.sampling.sampler_pool import sampler_engine_spec
from jobs.tiny_model import build_tiny_model

ROOT = Path(__file__).parents[2]
BUILDS = ("installed", pytest.param("gpu", marks=needs_gpu_build))
LORA = {"rank": 12, "targets": ["q_proj", "down_proj"]}
ZERO_2 = {"zero_stage": 2, "gpus_per_worker": 1}
RUNS = {
    "plain": {"sampling": {"gpus_per_sampler": 1}},
    "half a GPU": {"sampling": {"gpus_per_sampler": 0.5}},
    "eight GPUs": {"sampling": {"gpus_per_sampler": 8, "tensor_parallel_size": 8}},
    "two nodes": {"sampling": {"gpus_per_sampler": 8, "tensor_parallel_size": 4, "pipeline_parallel_size": 2}},
    "colocated": {"sampling": {"gpus_per_sampler": 1, "colocate": True}, "training": ZERO_2},
    "broadcast": {
        "sampling": {"gpus_per_sampler": 1},
        "training": {"gpus_per_worker": 1},
        "weights": {"transport": "nccl"},
    },
    "adapters": {"sampling": {"gpus_per_sampler": 1}, "weights": {"transport": "lora"}, "lora": LORA},
    "chosen": {
        "sampling": {
            "gpus_per_sampler": 1,
            "max_num_seqs": 300,
            "gpu_memory_utilization": 0.7,
            "engine_args": {"kv_cache_dtype": "fp8", "max_num_batched_tokens": 4096, "enable_prefix_caching": False},
        }
    },
}


@functools.cache
def model() -> Path:
    """A model whose heads can be split over eight GPUs. It is never loaded."""
    import tempfile

    return build_tiny_model(Path(tempfile.mkdtemp()) / "model", 1, 256, 2, 8, True, LENGTH)


def spec_of(run: str):
    config = tiny_config("/run", model(), **{"model": {"dtype": "bfloat16"}, **RUNS[run]})
    placement = EnginePlacement("node", ("3",)) if config.sampling.colocate else None
    return sampler_engine_spec(config, str(model()), (1,), placement)


@functools.cache
def configured(build: str, card: str) -> dict:
    """By run, what vLLM makes of its engine; with "service" for the context of vLLM's server."""
    path = [] if build == "installed" else [str(unpacked_vllm())]
    runs = [(run, "LLM_CLASS") for run in RUNS] + [("plain", "OPENAI_API_SERVER")]
    specs = [({**asdict(spec_of(run)), "lora": LORA if run == "adapters" else None}, context) for run, context in runs]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT)])}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/cuda_config_main.py"), card],
        input=json.dumps(specs), capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.rpartition("RESULT ")[2])
    return dict(zip([*RUNS, "service"], answer["engines"], strict=True)) | {"vllm": answer["vllm"]}


def test_the_arguments_of_every_kind_of_engine():
    plain = {
        "model": str(model()),
        "dtype": "bfloat16",
        "max_model_len": LENGTH,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": 0,
        "trust_remote_code": False,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "distributed_executor_backend": "uni",
        "load_format": "safetensors",
        "worker_extension_cls": "aft_ray.inference.vllm_worker.weight_loader.WeightLoader",
        "generation_config": "vllm",
        "gpu_memory_utilization": 0.9,
        "enable_sleep_mode": False,
    }
    differs = {
        "plain": {},
        "half a GPU": {"gpu_memory_utilization": 0.45},
        "eight GPUs": {"tensor_parallel_size": 8, "distributed_executor_backend": "mp"},
        "two nodes": {"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "distributed_executor_backend": "ray"},
        "colocated": {"gpu_memory_utilization": 0.8, "enable_sleep_mode": True},
        "broadcast": {"weight_transfer_config": {"backend": "aft_ray_nccl"}},
        "adapters": {
            "enable_lora": True, "max_loras": 1, "max_lora_rank": 16, "lora_target_modules": ["q_proj", "down_proj"],
        },
        "chosen": {
            "max_num_seqs": 300, "gpu_memory_utilization": 0.7, "kv_cache_dtype": "fp8",
            "max_num_batched_tokens": 4096, "enable_prefix_caching": False,
        },
    }  # fmt: skip
    for run in RUNS:
        assert engine_arguments(spec_of(run)) == plain | differs[run], run


def test_the_core_of_an_engine_on_gpus_is_a_process_unless_ray_starts_its_workers():
    assert {run for run in RUNS if not spec_of(run).has_core_process} == {"two nodes"}
    assert all(engine_environment(spec_of(run)) == {} for run in RUNS)


@pytest.mark.parametrize("build", BUILDS)
def test_vllm_takes_the_arguments_of_every_kind_of_engine(build):
    engines = configured(build, "h100")
    for run in RUNS:
        engine, spec = engines[run], spec_of(run)
        assert engine["processes"] == spec.tensor_parallel_size * spec.pipeline_parallel_size
        assert engine["executor"] == spec.executor
        assert (engine["dtype"], engine["max_length"]) == ("torch.bfloat16", LENGTH)
        assert engine["gpu_memory_utilization"] == spec.gpu_memory_utilization
        assert engine["sleep_mode"] == (run == "colocated")
        assert engine["weight_transfer"] == ("aft_ray_nccl" if run == "broadcast" else None)
        assert engine["lora_rank"] == (16 if run == "adapters" else None)
        assert engine["worker_extension"].endswith("WeightLoader")
        assert engine["worker"] == "vllm.v1.worker.gpu_worker.Worker"
        assert engine["logprobs"] == "raw_logprobs"  # the score is at temperature 1
        assert engine["chunked_prefill"]
        assert not engine["tokenizer"]
    assert engines["chosen"]["cache_dtype"] == "fp8"
    assert not engines["chosen"]["prefix_caching"]
    assert (engines["chosen"]["max_num_batched_tokens"], engines["chosen"]["max_num_seqs"]) == (4096, 300)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("card", "node", "sampler", "service"),
    [
        ("h100", "h100-80gb", (16384, 1024), (8192, 1024)),
        pytest.param("a100", "a100-80gb", (8192, 256), (2048, 256), marks=pytest.mark.slow),
    ],
)
def test_an_engine_takes_at_once_what_vllm_thinks_right_for_the_card(build, card, node, sampler, service):
    engines = configured(build, card)
    for run in set(RUNS) - {"chosen"}:
        assert (engines[run]["max_num_batched_tokens"], engines[run]["max_num_seqs"]) == sampler, run
    assert (engines["service"]["max_num_batched_tokens"], engines["service"]["max_num_seqs"]) == service
    assert default_max_num_seqs(NODES[node], True, 1) == sampler[1]  # what the plan counts with


@needs_gpu_build
def test_the_builds_are_two():
    assert configured("gpu", "h100")["vllm"] > configured("installed", "h100")["vllm"]
