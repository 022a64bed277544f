"""A request that harms its worker process is undecided; all other requests get their results."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from readers import MisbehavingTask, ProcessTask, TextTask

from aft_ray.storage.records import Verdict
from aft_ray.verify.process_pool import MAX_TEXT_LENGTH, VerificationRequest, Verifier, shared_verifier

DEADLINE_S = 1.0
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def verifier():
    verifier = Verifier(workers=2, deadline_s=DEADLINE_S, memory_bytes=256 << 20)
    yield verifier
    verifier.close()


def numbers(texts: list[str], gold: str = "12") -> list[VerificationRequest]:
    task = MisbehavingTask()
    return [VerificationRequest(task, text, gold) for text in texts]


def verdicts(verifier: Verifier, requests: list[VerificationRequest]) -> list[Verdict]:
    return [result.verdict for result in verifier.verify(requests)]


def test_results_come_in_order(verifier: Verifier) -> None:
    results = verifier.verify(numbers([str(number) for number in range(300)], gold="250"))
    assert [result.answer for result in results] == [str(number) for number in range(300)]
    assert [i for i, result in enumerate(results) if result.verdict is Verdict.RIGHT] == [250]
    assert sum(result.verdict is Verdict.WRONG for result in results) == 299
    assert verifier.verify([]) == []


@pytest.mark.parametrize(
    ("misbehaviour", "reason"),
    [
        ("loops", "took longer than 1 s"),
        ("calculates", "took longer than 1 s"),
        ("dies", "its process died (exit code 3)"),
        ("is_killed", "its process died (exit code -9)"),
        ("exits", "SystemExit: 0"),
        ("raises", "LookupError: no such thing"),
        ("recurses", "RecursionError"),
        ("eats_memory", "MemoryError"),
        ("gives_a_number", "TypeError: extract gave a int instead of a text"),
    ],
)
def test_only_the_harmful_request_is_undecided(verifier: Verifier, misbehaviour: str, reason: str) -> None:
    started = time.monotonic()
    results = verifier.verify(numbers(["12", "13", misbehaviour, "12", "12 or 13", "12"]))
    assert time.monotonic() - started < 6 * DEADLINE_S
    assert [result.verdict.value for result in results] == (
        ["right", "wrong", "undecided", "right", "undecided", "right"]
    )
    assert results[2].reason.startswith(reason)
    assert verdicts(verifier, numbers(["12"])) == [Verdict.RIGHT]


def test_several_harmful_requests_in_one_chunk(verifier: Verifier) -> None:
    texts = ["12", "loops", "12", "dies", "12", "12", "is_killed", "12"]
    expected = [Verdict.RIGHT if text == "12" else Verdict.UNDECIDED for text in texts]
    assert verdicts(verifier, numbers(texts)) == expected


def test_a_slow_chunk_is_not_a_slow_request(verifier: Verifier) -> None:
    assert verdicts(verifier, numbers(["sleeps_a_little"] * 60)) == [Verdict.RIGHT] * 60


def test_a_response_that_is_too_long_is_not_even_sent(verifier: Verifier) -> None:
    long, gold = verifier.verify(
        [
            VerificationRequest(TextTask("number"), "1" * (MAX_TEXT_LENGTH + 1), "1"),
            VerificationRequest(TextTask("number"), "1", "1" * 10**7),
        ]
    )
    assert (long.verdict, long.reason) == (Verdict.UNDECIDED, "the response has 100001 characters")
    assert gold.verdict is Verdict.UNDECIDED


def test_many_threads_share_it(verifier: Verifier) -> None:
    def one(number: int) -> bool:
        results = verifier.verify(numbers([str(number), "dies", "12"], gold=str(number)))
        return [o.verdict.value for o in results] == ["right", "undecided", "right" if number == 12 else "wrong"]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(8, 16)))


def test_an_idle_worker_that_is_killed_is_replaced() -> None:
    verifier = Verifier(deadline_s=DEADLINE_S)
    try:
        for _ in range(2):
            (result,) = verifier.verify([VerificationRequest(ProcessTask(), "pid", "")])
            os.kill(int(result.answer or 0), signal.SIGKILL)
            time.sleep(0.5)
        assert verdicts(verifier, numbers(["12"])) == [Verdict.RIGHT]
    finally:
        verifier.close()


def test_closed_it_leaves_nothing_and_can_start_again() -> None:
    verifier = Verifier(deadline_s=DEADLINE_S)
    (result,) = verifier.verify([VerificationRequest(ProcessTask(), "pid", "")])
    verifier.close()
    assert not alive(int(result.answer or 0))
    assert verdicts(verifier, numbers(["12"])) == [Verdict.RIGHT]
    verifier.close()
    verifier.close()


def test_one_verifier_for_a_process() -> None:
    with ThreadPoolExecutor(4) as threads:
        assert len({id(verifier) for verifier in threads.map(lambda _: shared_verifier(), range(8))}) == 1


SCRIPT = """
import sys
print("main runs")
sys.path.insert(0, {tests!r})
import torch
from readers import ProcessTask
from aft_ray.verify.process_pool import VerificationRequest, shared_verifier
text = {text!r}
print([result.answer for result in shared_verifier().verify([VerificationRequest(ProcessTask(), text, "x")])])
"""


def script(text: str) -> list[str]:
    return [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parents[1] / "support"), text=text)]


def test_workers_are_light_and_do_not_run_main_again(tmp_path: Path) -> None:
    path = tmp_path / "main.py"  # a file, without the usual guard
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1] / "support"), text="modules"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120, env=environment)
    assert out.stdout.splitlines() == ["main runs", "['']"], out.stderr
    assert out.stderr == ""


def test_workers_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(script(str(tmp_path / "pid")), env=environment, stdout=subprocess.DEVNULL)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", 60)
    worker = int((tmp_path / "pid").read_text())
    assert alive(worker)
    parent.kill()
    parent.wait()
    wait_until(lambda: not alive(worker), 10)


def verify_in_this_process() -> None:
    (result,) = shared_verifier().verify(numbers(["12"]))
    assert result.verdict is Verdict.RIGHT


def test_a_process_of_multiprocessing_that_verified_can_end() -> None:
    process = get_context("spawn").Process(target=verify_in_this_process)
    process.start()
    process.join(120)
    ended = process.exitcode
    process.kill()
    assert ended == 0


def test_works_in_ray_actors_and_tasks(ray_here: None) -> None:
    import ray

    tests = str(Path(__file__).parents[1] / "support")

    def verify() -> list[tuple[str, str | None]]:
        sys.path.insert(0, tests)
        from readers import MisbehavingTask, ProcessTask

        from aft_ray.verify.process_pool import VerificationRequest, shared_verifier

        task = MisbehavingTask()
        requests = [VerificationRequest(task, text, "12") for text in ("12", "13", "dies", "12")] + [
            VerificationRequest(ProcessTask(), "modules", "x")
        ]
        return [(result.verdict.value, result.answer) for result in shared_verifier().verify(requests)]

    class Actor:
        def verify(self) -> list[tuple[str, str | None]]:
            return verify()

        def verify_in_a_thread(self) -> list[tuple[str, str | None]]:
            found: list[list[tuple[str, str | None]]] = []
            thread = threading.Thread(target=lambda: found.append(verify()))
            thread.start()
            thread.join()
            return found[0]

    expected = [("right", "12"), ("wrong", "13"), ("undecided", None), ("right", "12"), ("wrong", "")]
    actor = ray.remote(Actor).options(max_concurrency=2).remote()
    calls = [actor.verify.remote(), actor.verify_in_a_thread.remote(), ray.remote(verify).remote()]
    assert ray.get(calls, timeout=120) == [expected] * 3


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
