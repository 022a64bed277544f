"""A service answers questions without pause while versions are published and while its processes are killed."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from processes import free_ports, wait_for
from safetensors.torch import load_file, save_file
from tiny import tiny_tree

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
DEADLINE_S = 8
WRONG_WEIGHTS = re.compile(r"did not take version 2 .*its weights are wrong, and it answers nothing")
QUESTIONS = [f"Tom has {n} apples. Tom finds {n + 2} more. how many apples does Tom have?" for n in range(3, 11)]


def aft_ray(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "aft_ray.cli", *arguments]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_model) -> Path:
    """A run of which versions 1 and 2 are trained, but not yet in the ledger: putting an entry back publishes it."""
    place = tmp_path_factory.mktemp("followed")
    config = place / "config.yaml"
    # Rounds of fine-tuning publish versions like any others, and need no engines.
    sections = {"rounds": {"count": 2, "evaluate_every": 0}, "objective": {"name": "vft"}}
    config.write_text(yaml.safe_dump(tiny_tree(place / "run", tiny_model, **sections)))
    done = subprocess.run(aft_ray("train", str(config)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (place / "held").mkdir()
    for entry in (place / "run" / "ledger").glob("training-*.json"):
        if json.loads(entry.read_text())["body"]["round"]:
            entry.rename(place / "held" / entry.name)
    return place / "run"


def publish(run_dir: Path, version: int) -> None:
    for entry in (run_dir.parent / "held").iterdir():
        if json.loads(entry.read_text())["body"]["round"] == version:
            entry.rename(run_dir / "ledger" / entry.name)


class Service:
    """`aft-ray serve` as a process of its own."""

    def __init__(self, run_dir: Path, log: Path) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        options = ["follow_s=1", "answering.max_tokens=16", f"limits.deadline_s={DEADLINE_S}", "reasoner.replicas=2"]
        command = aft_ray("serve", str(run_dir), "--follow", "--port", str(port), *options)
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        self.wait(lambda: "Ctrl-C" in log.read_text(), 600, "the start")

    def wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        wait_for(condition, seconds, what, self.process, self.log)

    def request(self, question: str, **more: Any) -> urllib.request.Request:
        body = {"question": question, "seed": 5, "n": 4, "stop_confidence": 1, "strategy": "score", **more}
        return urllib.request.Request(
            f"{self.url}/v1/reason", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )

    def ask(self, question: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        try:
            with urllib.request.urlopen(self.request(question), timeout=60) as response:
                return response.status, json.load(response), dict(response.headers)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error), dict(error.headers)

    def version(self) -> int | None:
        status, answer, _ = self.ask(QUESTIONS[0])
        return answer["version"] if status == 200 else None

    def session(self) -> Path:
        """The directory of its Ray."""
        lines = [" ".join(child.cmdline()) for child in psutil.Process(self.process.pid).children(recursive=True)]
        return Path(next(found[1] for line in lines if (found := re.search(r"--session_dir=(\S+)", line))))

    def rollout_log(self) -> str:
        return "".join(log.read_text() for log in (self.session() / "logs/serve").glob("*Rollout*"))

    def find(self, part: str) -> psutil.Process:
        """A process of the service."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if part in " ".join(process.cmdline()):
                    return process
        raise AssertionError(f"no process of {part}")

    def kill(self, part: str) -> None:
        """Kills one process of a deployment, as the failure of a machine would."""
        os.kill(self.find(f"ServeReplica:aft_ray:{part}").pid, signal.SIGKILL)

    @contextlib.contextmanager
    def frozen_engine(self) -> Iterator[None]:
        """A context in which the process of the engine is suspended."""
        engine = self.find("VLLM::EngineCore")
        engine.suspend()
        try:
            yield
        finally:
            engine.resume()


@pytest.fixture(scope="module")
def service(run_dir, tmp_path_factory):
    service = Service(run_dir, tmp_path_factory.mktemp("service") / "log")
    yield service
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(180) == 0, service.log.read_text()


class Load:
    """Clients that ask without pause, with the responses to them and the candidates of each question by version."""

    def __init__(self, service: Service, clients: int = 6) -> None:
        self.statuses: Counter[tuple[int, int | None]] = Counter()
        self.errors: list[dict[str, Any]] = []
        self.unready: list[dict[str, str]] = []
        self.candidates: dict[tuple[int, str], set[tuple[tuple[int, str], ...]]] = {}
        self._service = service
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(i,)) for i in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _client(self, first: int) -> None:
        turn = first
        while not self._ended.is_set():
            question = QUESTIONS[turn % len(QUESTIONS)]
            turn += 1
            status, answer, headers = self._service.ask(question)
            self.statuses[status, answer.get("version")] += 1
            if status == 200:
                drawn = tuple(sorted((one["index"], one["response"]) for one in answer["candidates"]))
                self.candidates.setdefault((answer["version"], question), set()).add(drawn)
            else:
                self.errors.append(answer["error"])
                if status == 503:
                    self.unready.append(headers)
                time.sleep(0.2)

    def assert_not_crossed(self) -> None:
        """A question's candidates by one version and seed are the same every time, and another question's are not."""
        assert all(len(drawn) == 1 for drawn in self.candidates.values())


def test_a_published_version_is_taken_while_questions_are_answered(service, run_dir):
    assert service.version() == 0
    with Load(service) as load:
        time.sleep(3)
        publish(run_dir, 1)
        service.wait(lambda: service.version() == 1, 60, "version 1")
        time.sleep(3)
    assert {status for status, _ in load.statuses} == {200}, load.errors[:3]
    assert {version for _, version in load.statuses} == {0, 1}
    load.assert_not_crossed()


def test_a_version_with_wrong_weights_never_answers(service, run_dir):
    (weights,) = (run_dir / "rounds/0002/model").glob("*.safetensors")
    kept = weights.with_suffix(".kept")
    shutil.copy(weights, kept)
    save_file({name: tensor * 1.1 for name, tensor in load_file(kept).items()}, weights, {"format": "pt"})
    with Load(service) as load:
        publish(run_dir, 2)
        service.wait(lambda: WRONG_WEIGHTS.search(service.rollout_log()) is not None, 60, "a refusal")
        time.sleep(3)
    assert set(load.statuses) == {(200, 1)}, load.errors[:3]
    load.assert_not_crossed()
    kept.rename(weights)


def test_at_the_deadline_the_best_so_far_is_the_answer(service):
    with contextlib.ExitStack() as frozen:
        request = service.request(QUESTIONS[0], n=64, max_tokens=100, temperature=1.5, stream=True)
        started = time.monotonic()
        with urllib.request.urlopen(request, timeout=60) as response:
            for line in response:
                if line.startswith(b"event: candidate"):
                    frozen.enter_context(service.frozen_engine())
                    break
            last = [line for line in response if line.startswith(b"data: ")][-1]
        answer = json.loads(last.removeprefix(b"data: "))
    assert answer["sampling"]["stopped"] == "deadline"
    assert 1 <= len(answer["candidates"]) < 64
    assert time.monotonic() - started < DEADLINE_S + 10


def test_without_a_candidate_at_the_deadline_the_question_is_too_late_and_the_next_is_answered(service):
    with service.frozen_engine():
        status, answer, _ = service.ask(QUESTIONS[0])
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (504, "timeout_error", "deadline")
    service.wait(lambda: service.version() == 1, 60, "an answer")


def test_a_killed_reasoner_loses_no_question_but_to_a_clean_503(service):
    with Load(service) as load:
        time.sleep(2)
        service.kill("Reasoner")
        time.sleep(6)
    assert {status for status, _ in load.statuses} <= {200, 503}, load.errors[:3]
    assert load.statuses[200, 1] > 0
    assert all("Retry-After" in headers or "retry-after" in headers for headers in load.unready)
    load.assert_not_crossed()


def test_a_killed_engine_is_replaced_by_one_with_the_current_version(service):
    with Load(service) as load:
        time.sleep(2)
        service.kill("Policy")
        time.sleep(2)
        service.wait(lambda: service.version() is not None, 300, "an engine")
    assert {status for status, _ in load.statuses} <= {200, 503}, load.errors[:3]
    assert {version for status, version in load.statuses if status == 200} == {1}
    assert all("no engine answers" in error["message"] for error in load.errors)
    load.assert_not_crossed()
