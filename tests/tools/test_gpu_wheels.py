"""The comparison with the real wheels of the GPU build, and the service's application built against them.

They run where the environment variable AFT_RAY_GPU_WHEELS names a directory with the wheels, as `make check-gpu` keeps
it. No GPU is needed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHEELS = os.environ.get("AFT_RAY_GPU_WHEELS", "")
pytestmark = pytest.mark.skipif(not WHEELS, reason="AFT_RAY_GPU_WHEELS names no directory with the GPU wheels")

# Builds the service's application of a model; then asks Ray to import its engine in a task, as it does for GPUs.
BUILD = """
import sys
import ray
import vllm
from aft_ray.config.serve import parse_serve_config
from aft_ray.serving.app import application, llm_config
from aft_ray.serving.model import resolve

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
config = parse_serve_config({"model": sys.argv[1], "task": {"task": "arithmetic"}, "engine": {"max_length": 128}, "access": {"open": True}})
resolved = resolve(config)
built = application(config, resolved)
from ray.llm._internal.serve.engines.vllm.vllm_engine import _normalize_vllm_engine_kwargs as function
engine = llm_config(config, resolved[0], (2,))
assert function.__module__ == "ray.llm._internal.serve.engines.vllm.vllm_engine"
task = ray.remote(num_cpus=0)(function).options(runtime_env=engine.runtime_env)
assert ray.get(task.remote({"seed": 1})) == {"seed": 1}
print("BUILT", vllm.__version__, type(built).__name__, engine.get_engine_config().frontend_kwargs)
"""


def test_nothing_that_is_used_differs_in_the_gpu_build():
    check = [sys.executable, str(ROOT / "tools/check_gpu_signatures.py"), "--wheels", WHEELS]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "handled   class    vllm.entrypoints.launchers.cli_args.FrontendArgs" in done.stdout


def test_the_application_is_built_and_its_engine_imported_with_the_gpu_build(tiny_model):
    unpacked = next(path for path in Path(WHEELS).resolve().glob("vllm-*") if path.is_dir())
    path = os.pathsep.join([str(unpacked), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(tiny_model)], env=environment, capture_output=True, text=True
    )
    assert "BUILT 0.33.0 Application {}" in done.stdout, done.stdout[-500:] + done.stderr[-3000:]
