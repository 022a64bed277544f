"""The module that starts the train workers needs no torch in the driver."""

import subprocess
import sys


def test_the_driver_imports_the_launch_without_torch():
    program = "import sys, aft_ray.training.launch, aft_ray.training.batching; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
