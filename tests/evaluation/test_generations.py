import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aft_ray.config.run import ConfigError, parse_config
from aft_ray.evaluation.answers import AnsweredQuestion, Response, missing_response
from aft_ray.evaluation.generations import generations_text, read_generations
from aft_ray.evaluation.statistics.metrics import measure
from aft_ray.storage.groups.group_files import write_group_file
from aft_ray.storage.records import Candidate, Group, Question, Verdict
from aft_ray.storage.run_dir import RunDir

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
SCORE = st.one_of(st.none(), st.floats(-20, 0))
RESPONSES = st.one_of(
    st.builds(
        Response, st.sampled_from([*Verdict]), st.one_of(st.none(), TEXT), SCORE, st.integers(0, 3), TEXT,
        st.one_of(st.none(), st.integers(1, 99)),
    ),
    st.builds(missing_response, st.integers(0, 3)),
)  # fmt: skip
ANSWERED = st.lists(
    st.builds(
        AnsweredQuestion,
        TEXT,
        st.one_of(st.none(), RESPONSES),
        st.lists(RESPONSES, min_size=1, max_size=4),
        TEXT,
        TEXT,
        TEXT,
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda question: question.id,
)


@pytest.fixture
def config(tmp_path):
    """The config of the arithmetic task, whose answers follow ####."""
    return parse_config({"run_dir": str(tmp_path), "model": {"name": "none"}})


def written(tmp_path, *rows):
    path = tmp_path / "theirs.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@settings(deadline=None)
@given(ANSWERED)
def test_what_is_written_reads_back_equal(tmp_path_factory, questions):
    path = tmp_path_factory.getbasetemp() / "generations.jsonl"
    path.write_text(generations_text(questions), encoding="utf-8")
    read = read_generations(path, None)
    assert read == questions
    assert measure(read, resamples=100).to_json() == measure(questions, resamples=100).to_json()


def test_answers_of_other_programs_are_read_and_verified_by_the_task(tmp_path, config):
    path = written(
        tmp_path,
        {"question": "2 + 2?", "gold": 4, "responses": ["So #### 4", "So #### 5"], "scores": [-0.25, -0.5]},
        "",
        {"id": 7, "answer_key": "9",
         "responses": [{"text": "#### 9", "logprobs": [-1, -2]}, {"text": "9", "score": -1}]},
    )  # fmt: skip
    first, second = read_generations(path, config)
    assert [(s.verdict, s.answer, s.score) for s in first.samples] == [
        (Verdict.RIGHT, "4", -0.25),
        (Verdict.WRONG, "5", -0.5),
    ]
    assert (second.id, second.gold) == ("7", "9")
    assert (second.samples[0].score, second.samples[0].tokens) == (-1.5, 2)
    assert second.samples[1].verdict is Verdict.WRONG  # no marker, no answer
    assert read_generations(path, config)[0].id == first.id  # a question without an id has the same one every time


def test_verdicts_of_a_file_are_used_without_a_task_and_replaced_with_one(tmp_path, config):
    row = {"id": "a", "gold": "4", "responses": [{"text": "#### 4", "verdict": "wrong"}], "greedy": {"text": "#### 4",
           "verdict": True}}  # fmt: skip
    path = written(tmp_path, row)
    (taken,), (verified,) = read_generations(path, None), read_generations(path, config)
    assert (taken.samples[0].verdict, taken.greedy.verdict) == (Verdict.WRONG, Verdict.RIGHT)
    assert verified.samples[0].verdict is Verdict.RIGHT


def test_verdicts_without_texts_are_enough(tmp_path, config):
    row = {"id": "a", "gold": "4", "responses": [{"verdict": "right"}, {"verdict": None}], "seeds": [1, 2]}
    path = written(tmp_path, row)
    for given_config in (None, config):
        (question,) = read_generations(path, given_config)
        assert [s.verdict for s in question.samples] == [Verdict.RIGHT, Verdict.UNDECIDED]
        assert [s.seed for s in question.samples] == [1, 2]


def test_a_missing_response_stays_undecided(tmp_path, config):
    path = tmp_path / "generations.jsonl"
    path.write_text(generations_text([AnsweredQuestion("a", missing_response(), [missing_response(3)], "", "?", "4")]))
    (question,) = read_generations(path, config)
    assert question.greedy.verdict is Verdict.UNDECIDED
    assert question.samples[0] == missing_response(3)


GOOD = {"id": "a", "gold": "4", "responses": [{"text": "#### 4", "verdict": "right"}]}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{'id': 3}", "line 2: not JSON: Expecting property name"),
        ("[1, 2]", "line 2: a line must be an object of fields, not a list"),
        ({"gold": "4", "responses": ["4"]}, "line 2: it has neither an id nor a question"),
        ({"id": "b", "responses": ["4"]}, r"line 2: it has no gold answer \(gold or answer_key\)"),
        ({"id": "b", "gold": "4"}, "line 2: it has no responses and no greedy response"),
        ({"id": "b", "gold": "4", "responses": "4"}, "line 2: responses must be a list"),
        ({**GOOD, "id": "b", "scores": [-1, -2]}, "line 2: scores must be a list as long as responses"),
        ({**GOOD, "id": "b", "scores": ["high"]}, "line 2: response 1: score must be a finite number, not 'high'"),
        ({**GOOD, "id": "b", "logprobs": [["a"]]}, "line 2: response 1: logprobs must be a list of numbers"),
        ({**GOOD, "id": "b", "verdicts": ["maybe"]}, "line 2: response 1 has the verdict 'maybe'"),
        ({"id": "b", "gold": "4", "responses": [{}]}, "line 2: response 1 has neither a text nor a verdict"),
        ({"id": "b", "gold": "4", "responses": [4]}, "line 2: response 1: text must be text, not 4"),
        ({"id": "b", "gold": "4", "responses": ["4"]}, "line 2: response 1 has no verdict; add --config CONFIG"),
        (GOOD, "line 2: the question 'a' was answered by an earlier line"),
        (
            '{"id": "b", "gold": "4", "scores": [NaN], "responses": [{"verdict": true}]}',
            "score must be a finite number",
        ),
    ],
)
def test_a_malformed_line_is_one_sentence_that_names_it(tmp_path, row, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        read_generations(written(tmp_path, GOOD, row), None)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match=r"empty.jsonl has no line"):
        read_generations(tmp_path / "empty.jsonl", None)
    with pytest.raises(ConfigError, match=r"cannot read the generations file .*latin.jsonl"):
        read_generations(tmp_path / "latin.jsonl", None)
    with pytest.raises(ConfigError, match=r"text.parquet cannot be read as a file of groups"):
        read_generations(tmp_path / "text.parquet", None)


def group(id, *candidates) -> Group:
    return Group(1, 0, Question(id, "2 + 2?", "#### 4", "4", "arithmetic"), [1], [2], list(candidates))


def test_the_groups_of_a_round_are_measured_like_any_samples(tmp_path, config):
    run_dir = RunDir(tmp_path / "run")
    right = Candidate([1, 2], -1.0, "stop", "#### 4", "4", Verdict.RIGHT, 1.0)
    wrong = Candidate([1, 2, 3, 4], -8.0, "stop", "#### 5", "5", Verdict.WRONG, 0.0)
    write_group_file(run_dir, [group("a", right, wrong), group("b", wrong, wrong)])
    write_group_file(run_dir, [group("c", right, right)])
    read = read_generations(run_dir.local_path(run_dir.groups(1)), None)
    assert [question.id for question in read] == ["a", "b", "c"]
    assert [sample.score for sample in read[0].samples] == [-0.5, -2.0]
    result = measure(read)
    assert result.estimates["pass@1"].value == 0.5
    assert result.estimates["pass@2"].value == pytest.approx(2 / 3)
    assert "greedy" not in result.estimates
    assert read_generations(run_dir.local_path(run_dir.groups(1)), config) == read

    write_group_file(run_dir, [Group(0, 0, group("a").question, [1], [2], [])])
    with pytest.raises(ConfigError, match="holds no group with samples"):
        read_generations(run_dir.local_path(run_dir.groups(0)), None)
    assert math.isfinite(result.estimates["perplexity"].value)
