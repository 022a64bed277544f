import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import pyarrow.fs as pafs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.storage.run_dir import MANIFEST, METRICS, RunDir, RunDirError


@pytest.fixture(params=["path", "file uri", "object store"])
def run_dir(request, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))
    (tmp_path / "store").mkdir()
    if request.param == "path":
        return RunDir(tmp_path / "store/run")
    if request.param == "file uri":
        return RunDir((tmp_path / "store/run").as_uri())
    # Not a LocalFileSystem to pyarrow, so it takes the ways of an object store.
    return RunDir("bucket/run", pafs.SubTreeFileSystem(str(tmp_path / "store"), pafs.LocalFileSystem()))


def model(tmp_path, weights=b"w" * 1000):
    folder = tmp_path / "built"
    (folder / "shards").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "shards/1.safetensors").write_bytes(weights)
    return folder


def run_python(code, *arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
    )


def test_files_are_written_read_listed_and_deleted(run_dir):
    assert run_dir.listdir("a") == []
    run_dir.write_bytes("a/b/one.bin", b"1")
    run_dir.write_bytes("a/b/one.bin", b"2")
    run_dir.write_json("a/two.json", {"x": [1, "é"]})
    assert run_dir.read_bytes("a/b/one.bin") == b"2"
    assert run_dir.read_json("a/two.json") == {"x": [1, "é"]}
    assert run_dir.listdir("a") == ["b", "two.json"]
    assert run_dir.exists("a/b")
    run_dir.delete("a/two.json")
    run_dir.delete("a/b")
    run_dir.delete("never/there")
    assert run_dir.listdir("a") == []
    with pytest.raises(FileNotFoundError):
        run_dir.read_bytes("a/two.json")


def test_lines_are_appended_and_a_torn_one_does_not_spoil_the_next(run_dir):
    for i in range(3):
        run_dir.append_line(METRICS, json.dumps({"i": i}))
    assert [json.loads(line)["i"] for line in run_dir.read_lines(METRICS)] == [0, 1, 2]
    pickle.loads(pickle.dumps(run_dir)).append_line(METRICS, '{"i": 3}\n{"i": 4}')  # another process
    assert [json.loads(line)["i"] for line in run_dir.read_lines(METRICS)] == [0, 1, 2, 3, 4]
    if run_dir.is_local:
        run_dir.local_path(METRICS).write_bytes(b'{"i": 0}\n{"i"')
        run_dir.append_line(METRICS, '{"i": 2}')
        assert run_dir.read_bytes(METRICS) == b'{"i": 0}\n{"i"\n{"i": 2}\n'


def test_a_run_directory_can_be_pickled(run_dir):
    run_dir.write_bytes("x", b"1")
    again = pickle.loads(pickle.dumps(run_dir))
    assert again.read_bytes("x") == b"1"
    assert again.uri("x") == run_dir.uri("x")


def test_paths_are_those_of_the_layout(tmp_path):
    run_dir = RunDir(tmp_path)
    assert run_dir.groups(1) == "rounds/0001/groups"
    assert run_dir.checkpoint(12) == "rounds/0012/checkpoint"
    assert run_dir.checkpoint(12, 40) == "rounds/0012/checkpoint-000040"
    assert run_dir.local_path(run_dir.model(3)) == tmp_path / "rounds/0003/model"
    assert run_dir.uri("a") == f"{tmp_path}/a"


def test_an_unknown_uri_scheme_is_refused_in_one_sentence():
    with pytest.raises(RunDirError, match="cannot use the run directory nope://x"):
        RunDir("nope://x/y")


def test_a_stored_directory_is_read_back_whole(run_dir, tmp_path):
    assert not run_dir.is_complete("model")
    assert "never completed" in run_dir.verify_manifest("model")[0]
    with pytest.raises(RunDirError, match="never completed"):
        run_dir.fetch_directory("model")
    for weights in (b"old", b"new"):  # the second replaces the first
        run_dir.store_directory(model(tmp_path, weights), "model")
        assert not (tmp_path / "built").exists()
        assert run_dir.verify_manifest("model") == []
        fetched = run_dir.fetch_directory("model")
        assert (fetched / "shards/1.safetensors").read_bytes() == weights
        assert run_dir.fetch_directory("model") == fetched
    files = run_dir.read_json(f"model/{MANIFEST}")["files"]
    assert {name: entry["size"] for name, entry in files.items()} == {"config.json": 2, "shards/1.safetensors": 3}


def test_several_writers_add_to_one_directory_that_a_manifest_then_completes(run_dir, tmp_path):
    written = []
    for rank in range(2):
        (tmp_path / f"rank{rank}" / "state").mkdir(parents=True)
        (tmp_path / f"rank{rank}" / "state" / f"{rank}.pt").write_bytes(bytes([rank]) * 100)
        written += run_dir.add_files(tmp_path / f"rank{rank}", "checkpoint")
    with run_dir.create_file("checkpoint", "notes/index.json") as file:
        file.write(b"{")
        file.write(memoryview(b"}"))
    assert not run_dir.is_complete("checkpoint")
    run_dir.write_manifest("checkpoint", [file.entry, *written])
    assert run_dir.verify_manifest("checkpoint") == []
    assert [one.name for one in run_dir.read_manifest("checkpoint")] == ["notes/index.json", "state/0.pt", "state/1.pt"]
    assert run_dir.hash_files("checkpoint") == run_dir.read_manifest("checkpoint")


def test_a_file_that_its_writer_gave_up_does_not_appear_on_a_mounted_filesystem(tmp_path):
    run_dir = RunDir(tmp_path)
    with pytest.raises(ZeroDivisionError), run_dir.create_file("d", "file") as file:  # noqa: PT012
        file.write(b"half")
        raise ZeroDivisionError
    assert run_dir.hash_files("d") == []
    assert os.listdir(tmp_path / "d") == []


def test_no_manifest_names_a_file_that_others_do_not_see(run_dir, tmp_path):
    (tmp_path / "rank").mkdir()
    (tmp_path / "rank/1.pt").write_bytes(b"12345")
    written = run_dir.add_files(tmp_path / "rank", "c")
    run_dir.write_bytes("c/1.pt", b"123")
    with pytest.raises(RunDirError, match=r"c/1.pt has 3 bytes instead of 5 .* every node of the run sees"):
        run_dir.write_manifest("c", written)
    run_dir.delete("c/1.pt")
    with pytest.raises(RunDirError, match=r"c/1.pt is missing although its writer finished it"):
        run_dir.write_manifest("c", written)
    assert not run_dir.is_complete("c")


def test_only_the_files_that_are_asked_for_are_fetched_and_compared(run_dir, tmp_path):
    run_dir.store_directory(model(tmp_path), "model")
    run_dir.write_bytes("model/config.json", b"[]")  # damaged, and not asked for
    wanted = [file for file in run_dir.read_manifest("model") if file.name.startswith("shards/")]
    run_dir.fetch_files("model", wanted, tmp_path / "fetched")
    assert [one.name for one in (tmp_path / "fetched").iterdir()] == ["shards"]
    assert (tmp_path / "fetched/shards/1.safetensors").read_bytes() == b"w" * 1000
    with pytest.raises(RunDirError, match=r"config.json is corrupted"):
        run_dir.fetch_files("model", run_dir.read_manifest("model"), tmp_path / "all")
    run_dir.delete("model/config.json")
    with pytest.raises(RunDirError, match=r"config.json is missing"):
        run_dir.fetch_files("model", run_dir.read_manifest("model"), tmp_path / "again")


def test_a_damaged_directory_names_its_files(run_dir, tmp_path):
    run_dir.store_directory(model(tmp_path), "model")
    run_dir.write_bytes("model/shards/1.safetensors", b"w" * 999 + b"v")
    run_dir.delete("model/config.json")
    missing, corrupted = run_dir.verify_manifest("model")
    assert "model/config.json is missing" in missing
    assert "model/shards/1.safetensors is corrupted" in corrupted
    run_dir.write_bytes("model/shards/1.safetensors", b"short")
    assert "has 5 bytes instead of 1000" in run_dir.verify_manifest("model")[1]
    run_dir.write_bytes(f"model/{MANIFEST}", b"{}")
    assert run_dir.verify_manifest("model") == [f"{run_dir.uri('model')}/{MANIFEST} is corrupted"]


def test_a_damaged_download_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))
    run_dir = RunDir("b/run", pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()))
    run_dir.store_directory(model(tmp_path), "model")
    run_dir.write_bytes("model/config.json", b"[]")
    with pytest.raises(RunDirError, match=r"the download of .*config.json is corrupted"):
        run_dir.fetch_directory("model")
    assert not list((tmp_path / "cache").rglob("config.json"))


@settings(max_examples=40, deadline=None)
@given(data=st.binary(min_size=1, max_size=64), position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_directory_is_found(tmp_path_factory, data, position, bit):
    run_dir = RunDir(tmp_path_factory.mktemp("flip"))
    run_dir.write_bytes("d/file", data)
    run_dir.write_manifest("d", run_dir.hash_files("d"))
    flipped = bytearray(data)
    flipped[position % len(data)] ^= 1 << bit
    run_dir.write_bytes("d/file", bytes(flipped))
    assert len(run_dir.verify_manifest("d")) == 1


WRITE_FOR_EVER = """
import sys
from aft_ray.storage.run_dir import RunDir
run_dir, i = RunDir(sys.argv[1]), 0
while True:
    run_dir.write_bytes("file", bytes([i % 251]) * 300_000)
    if i == 0:
        print("started", flush=True)
    i += 1
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    run_dir = RunDir(tmp_path)
    for delay in (0.0, 0.011, 0.023, 0.037):
        writer = run_python(WRITE_FOR_EVER, tmp_path)
        assert writer.stdout.readline() == b"started\n"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        data = run_dir.read_bytes("file")
        assert len(data) == 300_000
        assert len(set(data)) == 1
        assert run_dir.listdir() == ["file"]
    run_dir.delete_leftovers("")
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.write_bytes("file", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(RunDirError, match=r"cannot write .*file: .*; make room there and start again"):
            run_dir.write_bytes("file", b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert run_dir.read_bytes("file") == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_no_space_left_is_the_same_sentence(tmp_path):
    (tmp_path / METRICS).symlink_to("/dev/full")
    with pytest.raises(RunDirError, match="No space left on device") as caught:
        RunDir(tmp_path).append_line(METRICS, "{}")
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_other_errors_keep_their_own_words(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        RunDir(tmp_path).write_bytes("file/below", b"")


HOLD_THE_LOCK = """
import sys, time
from aft_ray.storage.run_dir import RunDir
with RunDir(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_driver_at_a_time_and_death_releases_the_lock(tmp_path):
    run_dir = RunDir(tmp_path)
    holder = run_python(HOLD_THE_LOCK, tmp_path)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(RunDirError, match=rf"in use by process {holder.pid} on "), run_dir.lock():
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with run_dir.lock():
        pass
    with run_dir.lock():
        pass


def test_an_object_store_has_no_paths(tmp_path):
    run_dir = RunDir("b", pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()))
    with pytest.raises(RunDirError, match="no local path"):
        run_dir.local_path("x")
