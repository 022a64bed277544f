"""The GPU build of vLLM, unpacked: `make check-gpu` leaves it in GPU_WHEELS. Tests that read it need no GPU."""

import os
from pathlib import Path

import pytest

WHEELS = Path(os.environ.get("GPU_WHEELS", str(Path(__file__).parents[2] / ".gpu-wheels"))).resolve()


def unpacked_vllm():
    """The directory that holds the GPU build's package `vllm`; None where it has not been unpacked."""
    return next((path for path in sorted(WHEELS.glob("vllm-*")) if path.is_dir()), None)


needs_gpu_build = pytest.mark.skipif(
    unpacked_vllm() is None, reason=f"the build for GPUs is not in {WHEELS}; `make check-gpu` puts it there"
)
