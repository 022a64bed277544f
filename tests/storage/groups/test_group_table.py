"""The questions of a run outside of Python's memory: the same groups, in any order, for any round."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.storage.groups import group_table
from aft_ray.storage.groups.group_table import GroupTable
from aft_ray.storage.records import Candidate, Group, Question, Verdict, groups_to_table, table_to_groups
from aft_ray.storage.run_dir import RunDirError


def group(number: int) -> Group:
    question = Question(f"q{number}", f"text {number}", "#### 4", "4", f"task {number % 3}")
    candidates = [Candidate([number], -1.0, "stop", "4", "4", Verdict.RIGHT, 1.0)] * (number % 2)
    return Group(0, 0, question, list(range(number % 5)), [number], candidates)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 40), batch=st.integers(1, 16), block=st.integers(1, 16), data=st.data())
def test_a_table_is_the_sequence_that_it_was_made_of(count, batch, block, data):
    groups = list(map(group, range(count)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_table, "_BATCH", batch)
        patch.setattr(group_table, "_BLOCK", block)
        table = GroupTable.of(iter(groups))
        assert GroupTable.of(table) is table
        assert list(table) == groups
        assert table == groups
        assert [table[index] for index in range(-count, count)] == groups * 2
        with pytest.raises(IndexError):
            table[count]
        start, end = sorted(data.draw(st.tuples(st.integers(0, count), st.integers(0, count))))
        assert list(table[start:end]) == groups[start:end]
        assert table_to_groups(table.block(start, 7)) == groups[start : start + 7]
        assert table.block(start, 7).schema == groups_to_table([]).schema
        if count:
            chosen = data.draw(st.lists(st.integers(0, count - 1), max_size=20))
            assert list(table.select(np.array(chosen, dtype=np.int64))) == [groups[index] for index in chosen]
        by_id = sorted(groups, key=lambda one: one.question.id)
        assert list(table.sorted_by_id()) == by_id
        assert list(table.sorted_by_id().ids) == [one.question.id for one in by_id]
        assert table.tasks.to_pylist() == [one.question.task for one in groups]


def test_a_view_has_its_own_round_and_version():
    table = GroupTable.of(map(group, range(5)))
    sampled = table.of_round(2, 1)
    assert {(one.round, one.policy_version) for one in sampled} == {(2, 1)}
    assert {(one.round, one.policy_version) for one in sampled.of_round(3)[1:4]} == {(3, 1)}
    assert {(one.round, one.policy_version) for one in table} == {(0, 0)}
    assert [one.question for one in sampled] == [one.question for one in table]


def test_different_groups_make_different_tables():
    table = GroupTable.of(map(group, range(3)))
    assert table != GroupTable.of(map(group, range(1, 4)))
    assert table != list(map(group, range(2)))
    assert table != table.of_round(1)


def test_a_full_disk_is_named_with_the_way_out(monkeypatch):
    class Full:
        def write_batch(self, batch):
            raise OSError(28, "No space left on device")

    with pytest.raises(RunDirError, match=r"cannot write the questions to .*No space left.*set TMPDIR"):
        group_table._write(Full(), [group(1)])
