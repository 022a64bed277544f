"""The questions of a run and of its rounds: the seed determines them, and questions that do not fit are left out."""

import json
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import tiny_config, tiny_tree

from aft_ray.config.run import ConfigError, parse_config
from aft_ray.storage.records import Group, Question
from aft_ray.tasks.dataset import (
    count_by_task,
    load_tokenizer,
    questions_of_round,
    round_shares,
    round_size,
    tokenize_split,
)


def config_of(tiny_model, tmp_path, /, limit=40, **sections):
    return tiny_config(tmp_path / "run", tiny_model, data={"train_limit": limit}, **sections)


def several(run_dir, model, weights, /, **sections):
    """A run of generated tasks with these weights; `sections` as in tiny_tree, `entries` keys of every task."""
    entry = {"task": "arithmetic", "train_limit": 20, "arithmetic": {"max_steps": 2}} | sections.pop("entries", {})
    tree = tiny_tree(run_dir, model, **sections)
    del tree["data"]
    tree["tasks"] = {name: {**entry, "weight": weight} for name, weight in weights.items()}
    return parse_config(tree)


def prepared(count, task="arithmetic"):
    return [Group(0, 0, Question(f"{task}{i:03d}", "", "", "", task), [1], [2], []) for i in range(count)]


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
        assert len(chosen) == round_size(config, count_by_task(groups), number) == min(size, count)
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


TASKS = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]), st.tuples(st.integers(1, 40), st.floats(0.5, 4)), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(tasks=TASKS, size=st.none() | st.integers(1, 80))
def test_a_round_is_shared_by_weight_and_has_no_question_twice(tmp_path_factory, tasks, size):
    config = several(
        tmp_path_factory.getbasetemp(),
        "m",
        {name: weight for name, (_, weight) in tasks.items()},
        rounds={"questions_per_round": size, "count": 3},
    )
    groups = [group for name, (count, _) in tasks.items() for group in prepared(count, name)]
    counts = count_by_task(groups)
    try:
        shares = round_shares(config, counts, 1)
    except ConfigError:  # The round is too small for all tasks; another test covers that.
        assume(False)
    total = sum(Fraction(weight) for _, weight in tasks.values())
    number = sum(shares.values())
    for name, (_, weight) in tasks.items():
        assert abs(shares[name] - number * Fraction(weight) / total) < 1
    # With one more question, the exact share of some task would be more than its questions.
    assert number == size or any((number + 1) * Fraction(w) / total > count for count, w in tasks.values())
    assert round_size(config, counts, 2) == number
    assert round_shares(config, counts, 0) == counts
    drawn = Counter()
    for round_number in (1, 2, 3):
        chosen = questions_of_round(config, groups, round_number)
        assert ids(chosen) == sorted(set(ids(chosen)))
        assert count_by_task(chosen) == shares
        drawn.update(ids(chosen))
    for name in tasks:  # Every question of a task is used before any is used again.
        of_task = [drawn[group.question.id] for group in groups if group.question.task == name]
        assert max(of_task) - min(of_task) <= 1
    assert sorted(ids(questions_of_round(config, groups, 0))) == sorted(ids(groups))


@pytest.mark.parametrize(
    ("counts", "weights", "size", "shares"),
    [
        ({"a": 10, "b": 10}, {"a": 1, "b": 1}, None, {"a": 10, "b": 10}),
        ({"a": 10, "b": 4}, {"a": 1, "b": 1}, None, {"a": 4, "b": 4}),
        ({"a": 10, "b": 10}, {"a": 3, "b": 1}, None, {"a": 10, "b": 3}),
        ({"a": 10, "b": 10}, {"a": 3, "b": 1}, 8, {"a": 6, "b": 2}),
        ({"a": 10, "b": 10}, {"a": 2, "b": 1}, 10, {"a": 7, "b": 3}),
        ({"a": 2, "b": 10}, {"a": 1, "b": 1}, 100, {"a": 2, "b": 2}),
    ],
)
def test_the_shares_of_a_round(tmp_path, counts, weights, size, shares):
    config = several(tmp_path, "m", weights, rounds={"questions_per_round": size})
    assert round_shares(config, counts, 1) == shares


def test_a_task_that_would_have_no_question_in_any_round_is_refused(tmp_path):
    config = several(tmp_path, "m", {"a": 100, "b": 1}, rounds={"questions_per_round": 10})
    with pytest.raises(ConfigError, match=r"a round of 10 questions has none of tasks\.b \(20 training questions\)"):
        round_shares(config, {"a": 20, "b": 20}, 1)
    assert round_shares(config, {"a": 20, "b": 20}, 0) == {"a": 20, "b": 20}


def test_questions_are_rendered_once_sorted_and_end_with_the_end_token(tiny_model, tmp_path):
    config = config_of(tiny_model, tmp_path, limit=25)
    tokenizer = load_tokenizer(config)
    result = tokenize_split(config, "train", tokenizer)
    assert len(result.groups) == 25
    assert result.too_long == []
    assert ids(result.groups) == sorted(ids(result.groups))
    for group in result.groups:
        assert group.reference_token_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(group.prompt_token_ids).strip() == group.question.text
    assert tokenize_split(config, "train", tokenizer) == result


def test_each_task_has_its_own_limit_prompt_and_ids(tiny_model, tmp_path):
    config = several(tmp_path / "run", tiny_model, {"easy": 1, "hard": 1})
    hard = config.tasks["hard"].model_copy(update={"train_limit": 7, "validation_limit": 3, "prompt": "{question} !"})
    config = config.model_copy(update={"tasks": {**config.tasks, "hard": hard}})
    tokenizer = load_tokenizer(config)
    groups = tokenize_split(config, "train", tokenizer).groups
    assert count_by_task(groups) == {"easy": 20, "hard": 7}
    assert len(set(ids(groups))) == 27
    for group in groups:
        assert group.question.id.startswith(f"{group.question.task}-train-")
        asked = group.question.text + (" !" if group.question.task == "hard" else "")
        # The tiny tokenizer does not know "!" and drops what it does not know.
        assert tokenizer(asked)["input_ids"] == group.prompt_token_ids
    assert count_by_task(tokenize_split(config, "validation", tokenizer).groups)["hard"] == 3


def test_an_id_that_two_tasks_share_is_refused_with_the_way_out(tiny_model, tmp_path):
    rows = [{"key": f"k{i}", "question": "Ana has 3 pens.", "answer": "#### 3"} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    entry = {"task": "custom", "path": str(tmp_path), "custom": {"train": "train.jsonl", "id": "key"}}
    config = several(tmp_path / "run", tiny_model, {"one": 1, "two": 1}, entries=entry)
    with pytest.raises(ConfigError, match=r"two questions have the id 'k\d+'.*leave out custom\.id"):
        tokenize_split(config, "train", load_tokenizer(config))


def test_a_mistake_in_a_tasks_data_names_its_entry(tiny_model, tmp_path):
    config = several(tmp_path / "run", tiny_model, {"easy": 1}, entries={"task": "mmlu"})
    with pytest.raises(ConfigError, match=r"easy is MMLU.*aft-ray evaluate MODEL"):
        tokenize_split(config, "train", load_tokenizer(config))
    impossible = {"arithmetic": {"min_steps": 8, "max_steps": 8, "operations": "/"}}
    config = several(tmp_path / "run", tiny_model, {"easy": 1}, entries=impossible)
    with pytest.raises(ConfigError, match=r"found for tasks\.easy\.arithmetic"):
        tokenize_split(config, "train", load_tokenizer(config))


def test_questions_that_do_not_fit_are_left_out_and_named(tiny_model, tmp_path):
    whole = tokenize_split(config_of(tiny_model, tmp_path), "train", load_tokenizer(config_of(tiny_model, tmp_path)))
    lengths = sorted(len(g.prompt_token_ids) + len(g.reference_token_ids) for g in whole.groups)
    limit = lengths[-3]
    config = config_of(tiny_model, tmp_path, model={"max_length": limit}, sampling={"max_tokens": 8, "max_failed": 0.5})
    result = tokenize_split(config, "train", load_tokenizer(config))
    assert len(result.groups) == sum(length <= limit for length in lengths)
    assert sorted(ids(result.groups) + result.too_long) == ids(whole.groups)


def test_too_many_questions_that_do_not_fit_are_an_error_that_names_one(tiny_model, tmp_path):
    config = config_of(tiny_model, tmp_path, model={"max_length": 40}, sampling={"max_tokens": 8})
    with pytest.raises(
        ConfigError,
        match=r"\d+ of 40 train questions of arithmetic do not fit model.max_length=40.*arithmetic-train-",
    ):
        tokenize_split(config, "train", load_tokenizer(config))
