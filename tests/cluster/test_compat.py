"""Names that moved between the two supported builds of vLLM, and the processes in which Ray needs them."""

import importlib
import json
import os
import subprocess
import sys
import tracemalloc

import pytest

from aft_ray.cluster import compat
from aft_ray.cluster.connect import start_ray


@pytest.fixture
def moved(monkeypatch):
    """An empty table of moved modules, whose entries a test adds."""
    table = {}
    monkeypatch.setattr(compat, "MOVED_VLLM_MODULES", table)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    compat.alias_moved_modules()
    yield table
    for name in table:
        sys.modules.pop(name, None)


def test_a_moved_module_is_found_under_its_old_name(moved):
    moved["json.old_decoder"] = "json.decoder"
    old = importlib.import_module("json.old_decoder")
    assert old is sys.modules["json.decoder"]
    assert old.__spec__.name == "json.decoder"


def test_a_module_that_still_has_its_old_name_is_left_alone(moved):
    moved["json.tool"] = "json.decoder"
    assert importlib.import_module("json.tool").__name__ == "json.tool"


def test_a_module_that_is_nowhere_stays_missing(moved):
    moved["json.old_decoder"] = "json.no_decoder"
    with pytest.raises(ModuleNotFoundError, match="no_decoder"):
        importlib.import_module("json.old_decoder")
    with pytest.raises(ModuleNotFoundError, match="other"):
        importlib.import_module("json.other")


def test_the_alias_is_set_once(moved):
    compat.alias_moved_modules()
    assert len([finder for finder in sys.meta_path if type(finder).__name__ == "_MovedModules"]) == 1


def aliased() -> bool:
    """Whether this process finds moved modules. It stands for Ray's own functions: nothing in it imports `aft_ray`."""
    return any(type(finder).__name__ == "_MovedModules" for finder in sys.meta_path)


# vLLM starts its core in a process of its own, which connects to Ray with the environment of the engine.
CORE = """
import json, sys, ray
ray.init(address=sys.argv[1], runtime_env=json.loads(sys.argv[2]), log_to_driver=False)
worker = ray.remote(num_cpus=0)(lambda: [type(finder).__name__ for finder in sys.meta_path])
print("_MovedModules" in ray.get(worker.remote()))
"""


def test_every_ray_process_of_an_engine_finds_moved_modules_first():
    import ray

    start_ray(num_cpus=2, log_to_driver=False, runtime_env={"worker_process_setup_hook": "tracemalloc.start"})
    try:

        @ray.remote(num_cpus=0)
        class Replica:
            def look(self, address):
                # The function runs under a name of its own, as the one that Ray sends to a GPU does.
                task = ray.remote(num_cpus=0)(aliased)
                environment = dict(ray.get_runtime_context().runtime_env)
                core = subprocess.run(
                    [sys.executable, "-c", CORE, address, json.dumps(environment)], capture_output=True, text=True
                )
                return {
                    "replica": aliased(),
                    "its task": ray.get(task.remote()),
                    "worker of its core": core.stdout.split()[-1:] == ["True"] or core.stderr,
                    "hook of the job": tracemalloc.is_tracing(),
                    "variable": os.environ.get("AFT_RAY_TEST_VARIABLE"),
                }

        environment = compat.engine_runtime_env({"AFT_RAY_TEST_VARIABLE": "x"})
        # Ray's LLMServer gives its deployments a hook of its own beneath the environment of the engine.
        under = {"worker_process_setup_hook": "ray.llm._internal.serve._worker_process_setup_hook"}
        seen = ray.get(
            Replica.options(runtime_env=under | environment).remote().look.remote(ray.get_runtime_context().gcs_address)
        )
        assert seen == {
            "replica": True, "its task": True, "worker of its core": True, "hook of the job": True, "variable": "x",
        }  # fmt: skip
    finally:
        ray.shutdown()
