"""The module that starts the train workers: what it needs in the driver, and the environment of the workers."""

import subprocess
import sys

from aft_ray.config.run import TrainingConfig
from aft_ray.training.launch import worker_environment


def test_the_driver_imports_the_launch_without_torch():
    program = "import sys, aft_ray.training.launch, aft_ray.training.batching; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_segments_can_grow_on_gpus_unless_the_user_has_set_the_allocator(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    gpu = TrainingConfig(gpus_per_worker=1)
    assert worker_environment(TrainingConfig()) == {}
    assert worker_environment(gpu) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    assert worker_environment(gpu) == {}
