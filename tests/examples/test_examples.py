"""The examples run as they are, and show what they say."""

import re
import subprocess
import sys
from pathlib import Path

from old_run import unpack_old_run

ROOT = Path(__file__).parents[2]


def run(name, *arguments):
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_losses_in_another_loop_put_the_right_response_above_the_wrong_one():
    lines = run("losses_in_your_own_loop.py").splitlines()
    scores = [tuple(map(float, re.findall(r"-?\d+\.\d+", line)[1:])) for line in lines]
    (right, wrong), (right_after, wrong_after) = scores[0], scores[-1]
    assert right < wrong
    assert right_after > wrong_after
    assert right_after - wrong_after < 1


def test_an_objective_of_ones_own_is_built_by_its_import_path():
    printed = run("own_objective.py")
    # Pairs of the first group: 0.5 - (-1.0 + 0.8) = 0.7 and max(0, 0.5 - (-1.0 + 2.0)) = 0, mean 0.35 over two groups.
    assert "loss 0.175" in printed


def test_a_run_directory_is_read(tmp_path):
    printed = run("read_a_run.py", unpack_old_run(tmp_path).uri())
    assert "rounds [0, 1] are trained, 2 is the last" in printed
    assert re.search(r"round 1: 24 groups, 72 candidates, \d+% right", printed)
    assert printed.rstrip().endswith("rounds/0001/model")
