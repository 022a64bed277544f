"""Replies survive a kill and concurrent writers, and a file that cannot be used gives one sentence."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from aft_ray.verify.judge.cache import JudgeCache, JudgeCacheFailed, Reply, request_key

REPLY = Reply("Evaluation Evidence: über\nRating: 3", True, 100, 20)

WRITER = """
import sys
from pathlib import Path
from aft_ray.verify.judge.cache import JudgeCache, Reply
with JudgeCache(Path(sys.argv[1])) as cache:
    for index in range(int(sys.argv[2])):
        reply = cache.put(f"{sys.argv[3]}-{index}", Reply(sys.argv[3], True, 1, 1))
        reply = cache.put(f"shared-{index}", Reply(sys.argv[3], True, 1, 1))
        print(index, reply.text, flush=True)
"""


def start_writer(path, count, name) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), str(count), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_reply_is_read_as_it_was_stored_and_the_first_one_stays(tmp_path):
    with JudgeCache(tmp_path / "below" / "judge.sqlite") as cache:
        assert cache.get("a") is None
        assert cache.put("a", REPLY) == REPLY
        assert cache.put("a", Reply("other", False, 1, 1)) == REPLY
    with JudgeCache(tmp_path / "below" / "judge.sqlite") as cache:
        assert cache.get("a") == REPLY
        assert cache.get("b") is None


def test_a_key_names_everything_that_decides_a_reply():
    request = {"model": "m", "messages": [{"role": "user", "content": "é"}], "temperature": 1.0, "seed": 3}
    others = [{**request, "model": "n"}, {**request, "temperature": 0.5}, {**request, "seed": 4}, {"model": "m"}]
    keys = {request_key(request, 0), request_key(request, 1), *(request_key(other, 0) for other in others)}
    assert len(keys) == 6
    assert request_key(dict(reversed(request.items())), 0) == request_key(request, 0)


def test_a_stored_reply_is_there_after_a_kill(tmp_path):
    path = tmp_path / "judge.sqlite"
    writer = start_writer(path, 10**6, "w")
    seen = [writer.stdout.readline().split()[0] for _ in range(30)]
    os.kill(writer.pid, signal.SIGKILL)
    seen += [line.split()[0] for line in writer.stdout.read().splitlines() if line.endswith(" w")]
    writer.wait()
    with JudgeCache(path) as cache:
        assert all(cache.get(f"w-{index}") for index in seen)
        assert cache.put("after", REPLY) == REPLY


def test_several_processes_write_at_once_and_agree(tmp_path):
    path = tmp_path / "judge.sqlite"
    writers = {name: start_writer(path, 40, name) for name in ("a", "b", "c", "d")}
    said = {name: writer.communicate(timeout=120)[0].split() for name, writer in writers.items()}
    assert all(writer.returncode == 0 for writer in writers.values())
    with JudgeCache(path) as cache:
        for index in range(40):
            winner = cache.get(f"shared-{index}").text
            assert all(said[name][2 * index + 1] == winner for name in writers)
            assert all(cache.get(f"{name}-{index}").text == name for name in writers)


@pytest.mark.parametrize("begin", ["BEGIN", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_opening_waits_for_another_process_that_is_making_the_file(tmp_path, begin):
    path = tmp_path / "judge.sqlite"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE other (x)")
    other.execute(begin)
    other.execute("SELECT * FROM other").fetchall()
    release = threading.Timer(0.5, other.close)
    release.start()
    with JudgeCache(path) as cache:
        assert cache.put("a", REPLY) == REPLY
    release.join()


def test_a_cache_that_cannot_be_used_is_one_sentence(tmp_path):
    spoiled = tmp_path / "judge.sqlite"
    spoiled.write_bytes(b"no database at all, and long enough to look at" * 100)
    for path in (spoiled, spoiled / "below" / "judge.sqlite"):
        with pytest.raises(JudgeCacheFailed, match=r"judge.sqlite cannot be used .*move the file away") as error:
            JudgeCache(path)
        assert "\n" not in str(error.value)
