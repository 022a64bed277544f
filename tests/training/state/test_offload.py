"""The training state leaves the device whole, and training goes on with it as if it had stayed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[2] / "support"


@pytest.mark.slow
def test_nothing_of_a_deepspeed_engine_stays_on_the_device_and_everything_comes_back(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT)])}
    command = [sys.executable, str(SUPPORT / "offload_main.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    results = [line for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert results == [
        "0 float32 False ok",
        "1 bfloat16 False ok",
        "2 float32 True ok",
        "2 bfloat16 False ok",
        "3 bfloat16 False ok",
        "3 bfloat16 True ok",
    ], done.stdout + done.stderr[-3000:]
