"""Which training states a run keeps: `training.keep_checkpoints` in all. Ray Train deletes none of them.

Invariants: a state is deleted only when a newer one is durable and recorded; a state inside a round is of no use once
one after the round is durable.
"""

from __future__ import annotations

from collections.abc import Sequence

from aft_ray.storage.ledger import CheckpointRecord, Ledger


def states_to_keep(states: Sequence[CheckpointRecord], number: int) -> list[str]:
    """The directories of the states that stay, at most `number`.

    They are the newest state, the newest one after a round, and then the newest of the others. So a run with two states
    that is inside a round keeps the one from which the round began.

    Args:
        states: those that are there, oldest first.
    """
    newest_first = list(reversed(states))
    after_round = next((index for index, state in enumerate(newest_first) if state.complete), len(newest_first))
    useful = [state for index, state in enumerate(newest_first) if state.complete or index < after_round]
    in_order = [*useful[:1], *newest_first[after_round:][:1], *useful]
    return list(dict.fromkeys(state.checkpoint for state in in_order))[:number]


def delete_obsolete_states(ledger: Ledger, number: int) -> None:
    """Deletes all training states but those to keep, and what killed workers left of states that were never recorded.

    Rank 0 calls it while no state is being saved.
    """
    run_dir = ledger.run_dir
    present = run_dir.checkpoints()
    last_records = {record.checkpoint: record for record in ledger.checkpoints() if record.checkpoint in present}
    # A directory that was written twice has the place of its last record.
    states = [record for record in ledger.checkpoints() if last_records.get(record.checkpoint) is record]
    kept = states_to_keep([state for state in states if run_dir.is_complete(state.checkpoint)], number)
    for path in present:
        if path not in kept:
            run_dir.delete(path)
