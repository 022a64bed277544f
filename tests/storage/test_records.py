"""Groups survive the way to an Arrow table, to Parquet and back, whatever is in them."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.storage.records import (
    GROUP_SCHEMA,
    Candidate,
    Group,
    Question,
    Verdict,
    groups_to_table,
    table_to_groups,
    unique_ids,
)

text = st.text(st.characters(codec="utf-8"), max_size=30)
token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=20)
number = st.floats(allow_nan=False)
questions = st.builds(Question, text, text, text, text, text)
candidates = st.builds(
    Candidate, token_ids, number, st.sampled_from(["stop", "length"]), text, st.none() | text, st.sampled_from(Verdict),
    number,
)  # fmt: skip
groups = st.builds(
    Group, st.integers(0, 10**6), st.integers(0, 10**6), questions, token_ids, token_ids,
    st.lists(candidates, max_size=4),
)  # fmt: skip


def candidate(verdict, reward, tokens=(1, 2)):
    return Candidate(list(tokens), -1.0, "stop", "", None, verdict, reward)


@settings(max_examples=100, deadline=None)
@given(st.lists(groups, max_size=4))
def test_groups_survive_a_table_and_a_parquet_file(written):
    table = groups_to_table(written)
    assert table.schema == GROUP_SCHEMA
    assert table_to_groups(table) == written
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    read = pq.read_table(pa.BufferReader(sink.getvalue()))
    assert table_to_groups(read) == written


def test_columns_beside_the_schema_are_refused_only_when_one_of_ours_is_missing():
    group = Group(1, 0, Question("a", "t", "r", "g", "x"), [1], [2], [])
    with pytest.raises(ValueError, match=r"\['candidates', 'round'\] are missing"):
        table_to_groups(groups_to_table([group]).drop_columns(["round", "candidates"]))


def test_the_score_is_the_mean_log_probability_of_a_token():
    assert Candidate([4, 5, 6, 1], -6.0, "stop", "").score == -1.5
    assert Candidate([], 0.0, "length", "").score == -math.inf


@pytest.mark.parametrize(
    ("labels", "signal"),
    [
        ([(Verdict.RIGHT, 1.0), (Verdict.WRONG, 0.0)], True),
        ([(Verdict.RIGHT, 1.0), (Verdict.RIGHT, 1.0)], False),
        ([(Verdict.RIGHT, 1.0), (Verdict.UNDECIDED, 0.0)], False),
        ([(Verdict.RIGHT, 1.0), (Verdict.RIGHT, 0.5)], True),
        ([], False),
    ],
)
def test_only_decided_candidates_of_different_reward_give_a_signal(labels, signal):
    group = Group(1, 0, Question("a", "t", "r", "g", "x"), [1], [2], [candidate(*label) for label in labels])
    assert group.has_signal is signal


def test_an_id_that_occurs_twice_is_named():
    a, b = Question("a", "t", "r", "g", "x"), Question("b", "t", "r", "g", "x")
    assert unique_ids([a, b]) == [a, b]
    with pytest.raises(ValueError, match="'b'"):
        unique_ids([a, b, b])
