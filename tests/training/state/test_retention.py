"""Which training states of a run stay, and which are deleted."""

import pytest

from aft_ray.storage.ledger import CheckpointRecord, Ledger
from aft_ray.storage.run_dir import RunDir
from aft_ray.training.state.retention import delete_obsolete_states, states_to_keep


def state(name: str) -> CheckpointRecord:
    """`2` is the state after round 2, `2-7` that after step 7 of round 2."""
    number, _, step = name.partition("-")
    return CheckpointRecord(int(number), int(step or 99), name, not step)


@pytest.mark.parametrize(
    ("number", "states", "kept"),
    [
        (2, "", ""),
        (2, "0", "0"),
        (2, "0 1 2", "1 2"),
        # Inside a round: the newest state, and the one from which the round began.
        (2, "0 1 2-5", "1 2-5"),
        (2, "1 2-5 2-9", "1 2-9"),
        (3, "0 1 2-5 2-9", "1 2-5 2-9"),
        (3, "1 2-5 2-9 2-14", "1 2-9 2-14"),
        (4, "0 1 2-5", "0 1 2-5"),
        # A state after a round makes those inside it obsolete.
        (2, "1 2-9 2", "1 2"),
        (3, "1 2-5 2-9 2", "1 2"),
        # With one state, it is the newest one.
        (1, "1 2-5", "2-5"),
        (1, "1 2-5 2", "2"),
        # Inside the first round there is none after a round.
        (2, "0-3 0-6 0-9", "0-6 0-9"),
        # A round that was trained again, because the state after it was damaged.
        (2, "1 2 2-5", "2 2-5"),
    ],
)
def test_the_states_that_stay(number, states, kept):
    assert sorted(states_to_keep([state(name) for name in states.split()], number)) == sorted(kept.split())


def write(run_dir: RunDir, path: str, complete: bool = True) -> None:
    run_dir.write_bytes(f"{path}/state/shard.pt", b"1")
    if complete:
        run_dir.write_manifest(path, run_dir.hash_files(path))


def record(ledger: Ledger, number: int, step: int | None = None) -> None:
    path = ledger.run_dir.checkpoint(number, step)
    write(ledger.run_dir, path)
    ledger.record_checkpoint(CheckpointRecord(number, step or 99, path, step is None))


def test_directories_of_obsolete_states_and_of_killed_saves_are_deleted(tmp_path):
    run_dir = RunDir(tmp_path)
    ledger = Ledger(run_dir)
    for number, step in ((0, None), (1, 4), (1, None), (2, 4), (2, 8)):
        record(ledger, number, step)
    write(run_dir, run_dir.checkpoint(2, 12), complete=False)  # it was killed while it was saved
    write(run_dir, run_dir.checkpoint(2))  # it was killed before it was recorded
    write(run_dir, run_dir.model(1))
    write(run_dir, run_dir.groups(2), complete=False)
    delete_obsolete_states(ledger, 2)
    assert run_dir.checkpoints() == [run_dir.checkpoint(1), run_dir.checkpoint(2, 8)]
    assert Ledger(run_dir).last_checkpoint() == CheckpointRecord(2, 8, run_dir.checkpoint(2, 8), False)
    assert run_dir.is_complete(run_dir.model(1))
    assert run_dir.exists(run_dir.groups(2))


def test_a_state_that_was_written_again_counts_as_new(tmp_path):
    ledger = Ledger(RunDir(tmp_path))
    for number, step in ((0, None), (1, 4), (1, 8), (1, 4)):
        record(ledger, number, step)
    delete_obsolete_states(ledger, 2)
    assert ledger.run_dir.checkpoints() == [ledger.run_dir.checkpoint(0), ledger.run_dir.checkpoint(1, 4)]


def test_a_state_that_was_deleted_by_hand_is_no_state(tmp_path):
    ledger = Ledger(RunDir(tmp_path))
    for number, step in ((0, None), (1, None), (2, None)):
        record(ledger, number, step)
    ledger.run_dir.delete(ledger.run_dir.checkpoint(2))
    delete_obsolete_states(ledger, 2)
    assert ledger.run_dir.checkpoints() == [ledger.run_dir.checkpoint(0), ledger.run_dir.checkpoint(1)]
