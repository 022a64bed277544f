"""One running service for all tests that need one, since a start takes long. It is started by the command of a user."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import free_ports, marked_processes, wait_for
from served import LENGTH, ROOT, SMALL, Reasoner, train

START_S, STOP_S = 600, 90


@pytest.fixture(scope="package")
def reasoner(tmp_path_factory) -> Iterator[Reasoner]:
    from aft_ray.config.run import ArithmeticConfig
    from aft_ray.tasks.arithmetic.problems import generate

    here = tmp_path_factory.mktemp("serving")
    model = train(here / "tiny")
    keys = here / "keys.txt"
    key = uuid.uuid4().hex
    keys.write_text(f"# of the tests\n{key}\n")
    mark = f"AFT_RAY_TEST_{uuid.uuid4().hex}"
    temporary = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # the paths of sockets must be short
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_", "AFT_"))}
    environment |= {
        mark: "1",
        "RAY_AUTH_MODE": "disabled",
        "TMPDIR": str(temporary),
        # The GPU build's module names are those with which a service failed to start.
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "tests/support/gpu_layout"), str(ROOT), environment.get("PYTHONPATH", "")]
        ).rstrip(os.pathsep),
    }
    (port,) = free_ports(1)
    concurrency, queue = 2, 2
    command = [
        str(Path(sys.executable).parent / "aft-ray"), "serve", str(model), "task.task=arithmetic", f"--port={port}",
        f"access.keys_file={keys}", f"limits.concurrency={concurrency}", f"limits.queue={queue}",
        "limits.question_chars=1500", "limits.max_tokens=480", "answering.max_tokens=40", "engine.dtype=float32",
        f"engine.max_length={LENGTH}", "engine.kv_cache_gib=0.25",
    ]  # fmt: skip
    log = here / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=environment, cwd=here, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(lambda: "Ctrl-C stops it" in log.read_text(), START_S, "the service", process, log)
        problems = generate(ArithmeticConfig(**SMALL), "test", 60)
        yield Reasoner(
            url=f"http://127.0.0.1:{port}",
            model=model.name,
            model_directory=model,
            key=key,
            keys_file=keys,
            concurrency=concurrency,
            queue=queue,
            session=(temporary / "ray" / "session_latest").resolve(),
            said=log.read_text(),
            problems=tuple(question.text for question in problems),
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_S) == 0, log.read_text()
        deadline = time.monotonic() + 30
        while left := marked_processes(mark):
            assert time.monotonic() < deadline, f"left over: {left}"
            time.sleep(0.5)
    finally:
        for left in marked_processes(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        process.wait(30)
        shutil.rmtree(temporary, ignore_errors=True)
