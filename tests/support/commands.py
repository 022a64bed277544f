"""The `aft-ray` command as a process of its own."""

import subprocess
import sys


def command(*arguments, status=0, timeout=120):
    """Runs the command. Returns its output, or the sentence of its error if `status` is not 0."""
    done = subprocess.run(
        [sys.executable, "-m", "aft_ray.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == status, done.stdout + done.stderr
    if status == 0:
        assert done.stderr == ""
        return done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: ")
    return sentence.removeprefix("error: ")
