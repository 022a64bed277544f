"""The pipeline around the samplers, where it needs none."""

import subprocess
import sys


def test_a_process_that_only_labels_imports_no_framework():
    """There is one for every few cores of a cluster, and torch would be most of its start and of its memory."""
    code = "import sys, aft_ray.sampling.stream; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "aft_ray.sampling.stream" in imported
    assert not imported & {"torch", "transformers", "vllm", "openai"}
