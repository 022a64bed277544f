"""What the sampling pipeline imports."""

import subprocess
import sys


def test_a_process_that_only_labels_imports_no_framework():
    """A cluster runs one for every few cores; importing torch would be most of its start time and memory."""
    code = "import sys, aft_ray.sampling.stream; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "aft_ray.sampling.stream" in imported
    assert not imported & {"torch", "transformers", "vllm", "openai"}
