"""The comparison with the real wheels of the GPU build, and the service's application built against them.

They run where `make check-gpu` has put the wheels. No GPU is needed.
"""

import os
import subprocess
import sys
from pathlib import Path

from gpu_build import WHEELS, needs_gpu_build, unpacked_vllm

ROOT = Path(__file__).parents[2]
pytestmark = needs_gpu_build

# Builds the service's application of a model, without GPUs and for one; then reads the arguments of its engine in a Ray
# task of the engine's runtime environment that imports Ray's modules first, as Ray does it for GPUs.
BUILD = """
import sys
import ray
import vllm
from aft_ray.config.serve import parse_serve_config
from aft_ray.serving.app import application, llm_config
from aft_ray.serving.model import resolve
from ray.llm._internal.serve.engines.vllm.vllm_engine import _normalize_vllm_engine_kwargs as normalize

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
for gpus in 0, 1:
    keys = {"task": {"task": "arithmetic"}, "engine": {"max_length": 128, "gpus": gpus}, "access": {"open": True}}
    config = parse_serve_config({"model": sys.argv[1], **keys})
    resolved = resolve(config)
    assert type(application(config, resolved)).__name__ == "Application"
    engine = llm_config(config, resolved[0], (2,))
    task = ray.remote(num_cpus=0)(normalize).options(runtime_env=engine.runtime_env)
    arguments = ray.get(task.remote(engine.get_engine_config().get_initialization_kwargs()))
    built = vllm.AsyncEngineArgs(**arguments)
    print("BUILT", vllm.__version__, built.distributed_executor_backend, built.max_model_len)
"""


def test_nothing_that_is_used_differs_in_the_gpu_build():
    check = [sys.executable, str(ROOT / "tools/check_gpu_signatures.py"), "--wheels", str(WHEELS)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "handled   class    vllm.entrypoints.launchers.cli_args.FrontendArgs" in done.stdout


def test_the_application_and_the_arguments_of_its_engine_are_built_with_the_gpu_build(tiny_model):
    path = os.pathsep.join([str(unpacked_vllm()), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(tiny_model)], env=environment, capture_output=True, text=True
    )
    built = [line for line in done.stdout.splitlines() if line.startswith("BUILT")]
    assert built == ["BUILT 0.33.0 mp 128", "BUILT 0.33.0 ray 128"], done.stdout[-500:] + done.stderr[-3000:]
