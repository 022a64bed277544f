"""Runs `options_main.py`: gloo ranks that train with options of the trainer and resume."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from training_helpers import write_tiny_llama

SUPPORT = Path(__file__).parent


def run_cases(work, cases, ranks=2):
    """The results of some cases, by name, on a new tiny model in `work`; a case is what `options_main.py` describes."""
    write_tiny_llama(work / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    paths = [str(SUPPORT.parents[1]), str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    processes = []
    for rank in range(ranks):
        with open(work / f"{rank}.err", "w") as err:
            arguments = [str(rank), str(ranks), port, str(work), json.dumps(cases)]
            command = [sys.executable, str(SUPPORT / "options_main.py"), *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=err, stderr=err))
    try:
        for process in processes:
            assert process.wait(timeout=1500) == 0, "\n".join(path.read_text()[-3000:] for path in work.glob("*.err"))
    finally:
        for process in processes:
            process.kill()
    return torch.load(work / "options.pt", weights_only=False)
