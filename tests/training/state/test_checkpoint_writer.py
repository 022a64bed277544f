"""The writer of training states: when one is due inside a round, what is written where, and what a failure says.

Ray Train's report is replaced by a thread that calls the upload as Ray Train does.
"""

import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
import torch.distributed as dist

from aft_ray.storage.run_dir import RunDir, RunDirError
from aft_ray.training.state import checkpoint
from aft_ray.training.state.checkpoint import CheckpointFailed, CheckpointWriter


class Engine:
    """Saves like a DeepSpeed engine: a directory with a file of this rank."""

    def save_checkpoint(self, directory, tag, client_state, **_):
        path = Path(directory, tag, "mp_rank_00_model_states.pt")
        path.parent.mkdir(parents=True)
        path.write_text(str(client_state))


class HeldRunDir(RunDir):
    """Storage that copies nothing before `released` is set, and then fails if `failure` is."""

    released = threading.Event()
    failure: str | None = None

    def add_files(self, local_dir, path):
        assert self.released.wait(60)
        if self.failure:
            raise RunDirError(self.failure)
        return super().add_files(local_dir, path)


@pytest.fixture
def writer(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    storage = SimpleNamespace(experiment_fs_path=str(tmp_path / "run" / "rounds"), storage_filesystem=None)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
    threads = []

    def report(metrics, *, checkpoint, checkpoint_dir_name, checkpoint_upload_fn, **_):
        def upload():
            try:
                checkpoint_upload_fn(checkpoint, checkpoint_dir_name)
            except CheckpointFailed:
                return  # Ray Train writes it to the log

        threads.append(threading.Thread(target=upload))
        threads[-1].start()

    monkeypatch.setattr(ray.train, "report", report)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    run_dir = HeldRunDir(str(tmp_path / "run"))
    run_dir.released = threading.Event()
    failed = []
    monkeypatch.setattr(checkpoint, "call", lambda method, *arguments: method(*arguments))
    yield SimpleNamespace(
        writer=CheckpointWriter(run_dir, 0, 60, SimpleNamespace(fail=failed.append)), run_dir=run_dir, failed=failed
    )
    run_dir.released.set()
    for thread in threads:
        thread.join()
    dist.destroy_process_group()


def test_a_state_inside_a_round_has_a_directory_of_its_own_and_its_size_is_told(writer):
    writer.run_dir.released.set()
    told = []
    writer.writer.start(Engine(), 3, told.append, step=40)
    writer.writer.start(Engine(), 3, told.append)
    writer.writer.wait()
    inside, after = "rounds/0003/checkpoint-000040", "rounds/0003/checkpoint"
    assert writer.run_dir.checkpoints() == [after, inside]
    assert writer.run_dir.verify_manifest(inside) == writer.run_dir.verify_manifest(after) == []
    texts = [writer.run_dir.read_bytes(f"{path}/state/mp_rank_00_model_states.pt") for path in (inside, after)]
    assert texts == [b"{'round': 3, 'step': 40}", b"{'round': 3, 'step': None}"]
    assert told == [len(text) for text in texts]
    assert list(Path(tempfile.gettempdir()).iterdir()) == []


def test_a_state_is_due_after_its_seconds_and_put_off_while_another_is_saved(writer, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock.now)
    writer.writer.begin_round()
    assert not writer.writer.is_due(30)
    clock.now += 30
    assert writer.writer.is_due(30)
    assert not writer.writer.is_due(0)  # none inside a round
    writer.writer.start(Engine(), 1, lambda size: None, step=5)
    clock.now += 500
    assert not writer.writer.is_due(30)
    writer.run_dir.released.set()
    writer.writer.wait()
    assert writer.writer.is_due(30)
    writer.writer.begin_round()
    assert not writer.writer.is_due(30)


def test_a_state_inside_a_round_that_cannot_be_saved_ends_the_run_in_one_sentence(writer):
    writer.run_dir.failure = "cannot write there: No space left on device; make room there"
    writer.run_dir.released.set()
    writer.writer.start(Engine(), 2, lambda size: pytest.fail("it is not durable"), step=7)
    sentence = "the checkpoint of step 7 of round 2 could not be saved: cannot write there: No space left on device"
    with pytest.raises(CheckpointFailed, match=sentence):
        writer.writer.wait()
    assert writer.failed == [f"{sentence}; make room there"]
    assert not writer.run_dir.is_complete("rounds/0002/checkpoint-000007")
