"""The questions of a run and of its rounds: drawn by the seed, all before any repeats, and none that cannot fit."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from aft_ray.config import ConfigError
from aft_ray.questions import load_tokenizer, prepare, questions_of_round, round_size
from aft_ray.records import Group, Question


def config_of(tiny_model, tmp_path, /, **sections):
    return tiny_config(tmp_path / "run", tiny_model, **sections)


def prepared(count):
    return [Group(0, 0, Question(f"q{i:03d}", "", "", "", ""), [1], [2], []) for i in range(count)]


def ids(groups):
    return [group.question.id for group in groups]


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 30), size=st.integers(1, 35), seed=st.integers(0, 5))
def test_every_question_is_drawn_before_any_is_drawn_again(tmp_path_factory, count, size, seed):
    config = tiny_config(tmp_path_factory.mktemp("run"), "m", rounds={"questions_per_round": size}, seed=seed)
    groups = prepared(count)
    drawn = Counter()
    rounds = 2 * -(-count // size)
    for number in range(1, rounds + 1):
        chosen = questions_of_round(config, groups, number)
        assert ids(chosen) == sorted(set(ids(chosen)))
        assert len(chosen) == round_size(config, count, number) == min(size, count)
        assert {group.round for group in chosen} == {number}
        drawn.update(ids(chosen))
        assert max(drawn.values()) - min(drawn[name] for name in ids(groups)) <= 1
    assert ids(questions_of_round(config, groups, 0)) == ids(groups)


def test_a_draw_depends_on_the_seed_and_the_round_alone(tiny_model, tmp_path):
    config = config_of(tiny_model, tmp_path, rounds={"questions_per_round": 10})
    other = config_of(tiny_model, tmp_path, rounds={"questions_per_round": 10}, seed=1)
    first = questions_of_round(config, prepared(40), 3)
    assert first == questions_of_round(config, prepared(40), 3)
    assert ids(first) != ids(questions_of_round(other, prepared(40), 3))
    assert set(ids(first)).isdisjoint(ids(questions_of_round(config, prepared(40), 2)))


def test_questions_are_rendered_once_sorted_and_end_with_the_end_token(tiny_model, tmp_path):
    config = config_of(tiny_model, tmp_path)
    tokenizer = load_tokenizer(config)
    result = prepare(config, "train", tokenizer, 25)
    assert len(result.groups) == 25
    assert result.too_long == []
    assert ids(result.groups) == sorted(ids(result.groups))
    for group in result.groups:
        assert group.reference_token_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(group.prompt_token_ids).strip() == group.question.text
    assert prepare(config, "train", tokenizer, 25) == result


def test_questions_that_do_not_fit_are_left_out_and_named(tiny_model, tmp_path):
    whole = prepare(config_of(tiny_model, tmp_path), "train", load_tokenizer(config_of(tiny_model, tmp_path)), 40)
    lengths = sorted(len(g.prompt_token_ids) + len(g.reference_token_ids) for g in whole.groups)
    limit = lengths[-3]
    config = config_of(tiny_model, tmp_path, model={"max_length": limit}, sampling={"max_tokens": 8, "max_parked": 0.5})
    result = prepare(config, "train", load_tokenizer(config), 40)
    assert len(result.groups) == sum(length <= limit for length in lengths)
    assert sorted(ids(result.groups) + result.too_long) == ids(whole.groups)


def test_too_many_questions_that_do_not_fit_are_an_error_that_names_one(tiny_model, tmp_path):
    config = config_of(tiny_model, tmp_path, model={"max_length": 40}, sampling={"max_tokens": 8})
    with pytest.raises(
        ConfigError, match=r"\d+ of 40 train questions do not fit model.max_length=40.*arithmetic-train-"
    ):
        prepare(config, "train", load_tokenizer(config), 40)
