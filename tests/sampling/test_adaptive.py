"""The decisions of adaptive sampling: how many candidates a question gets, and which questions a round leaves out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aft_ray.config.run import AdaptiveConfig, ConfigError, parse_config
from aft_ray.config.sections import SamplingConfig
from aft_ray.sampling.adaptive import (
    all_right,
    ask_probability,
    longest_streak,
    needs_more,
    next_candidates,
    questions_to_skip,
    streaks,
)
from aft_ray.storage.records import Candidate, Group, Question, Verdict

VERDICTS = st.sampled_from(list(Verdict))
RULES = st.builds(
    AdaptiveConfig,
    skip_after=st.integers(0, 4),
    ask_probability=st.floats(0.01, 0.99),
    min_ask_probability=st.floats(0.01, 1),
)


def candidates(verdicts):
    rewards = {Verdict.RIGHT: 1.0, Verdict.WRONG: 0.0, Verdict.UNDECIDED: 0.0}
    return [Candidate([1], 0.0, "stop", "", "1", one, rewards[one], "why" * (one == "undecided")) for one in verdicts]


def grown(verdicts, initial, step, most) -> int:
    """How many candidates a question gets whose candidates would have these verdicts."""
    count = initial
    while (more := next_candidates(count, most, step)) and needs_more(candidates(verdicts[:count])):
        count += more
    return count


@given(st.lists(VERDICTS, max_size=9))
def test_with_binary_rewards_a_question_needs_more_exactly_while_its_group_has_no_signal(verdicts):
    group = Group(1, 0, Question("q", "", "", "", ""), [1], [1], candidates(verdicts))
    assert needs_more(group.candidates) is not group.has_signal


@given(st.lists(VERDICTS, min_size=16, max_size=16), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10))
def test_a_question_gets_no_candidate_too_few_and_less_than_a_step_too_many(verdicts, initial, step, beyond):
    most = initial + beyond
    count = grown(verdicts, initial, step, most)
    assert initial <= count <= most
    enough = next((n for n in range(1, most + 1) if not needs_more(candidates(verdicts[:n]))), most)
    assert count == most if enough == most else max(initial, enough) <= count < max(initial, enough) + step


@given(st.lists(VERDICTS, min_size=16, max_size=16), st.integers(1, 6), st.integers(1, 5), st.integers(6, 15))
def test_a_higher_bound_never_gives_a_question_fewer_candidates(verdicts, initial, step, most):
    assert grown(verdicts, initial, step, most) <= grown(verdicts, initial, step, most + 1)


@given(RULES, st.integers(0, 40))
def test_the_probability_of_asking_falls_with_the_streak_to_its_bound(rules, length):
    now, later = ask_probability(length, rules), ask_probability(length + 1, rules)
    assert rules.min_ask_probability <= later <= now <= 1
    if not rules.skip_after or length < rules.skip_after:
        assert now == 1
    else:
        assert ask_probability(max(length, longest_streak(rules)), rules) == ask_probability(10_000, rules)


def test_the_probability_of_asking_halves_with_each_round():
    rules = AdaptiveConfig(skip_after=2, ask_probability=0.5, min_ask_probability=0.1)
    assert [ask_probability(length, rules) for length in range(7)] == [1, 1, 0.5, 0.25, 0.125, 0.1, 0.1]
    assert longest_streak(rules) == 5


@pytest.mark.parametrize(("right", "decided", "expected"), [(0, 0, False), (3, 3, True), (2, 3, False), (0, 2, False)])
def test_all_right_needs_a_decided_answer(right, decided, expected):
    assert all_right(right, decided) is expected


@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), st.booleans()), max_size=8), st.integers(1, 4), st.randoms())
def test_streaks_count_the_latest_rounds_that_asked_a_question(rounds, longest, random):
    expected = {}
    for id in "abcde":
        answers = [results[id] for results in rounds if id in results]
        length = answers.index(False) if False in answers else len(answers)
        if length:
            expected[id] = min(length, longest)
    shuffled = [random.sample(list(results.items()), len(results)) for results in rounds]
    assert streaks(shuffled, "abcde", longest) == expected


def test_streaks_read_no_more_rounds_than_they_need():
    def rounds():
        yield [("a", False), ("b", True)]
        yield [("b", True)]
        raise AssertionError("both streaks have ended")

    assert streaks(rounds(), ["a", "b"], 2) == {"b": 2}


@given(
    RULES, st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=30), st.integers(0, 5), st.integers(0, 40)
)
def test_which_questions_are_skipped(rules, lengths, number, least):
    ids = sorted(lengths)
    skipped = questions_to_skip(ids, lengths, rules, 7, number, least)
    assert skipped == questions_to_skip(list(reversed(ids)), dict(reversed(lengths.items())), rules, 7, number, least)
    assert skipped == sorted(skipped)
    assert all(rules.skip_after and lengths[id] >= rules.skip_after for id in skipped)
    assert len(ids) - len(skipped) >= min(least, len(ids))
    # A question's own decision does not depend on the others, except that `least` of them are asked.
    alone = {id for id in ids if questions_to_skip([id], lengths, rules, 7, number, 0)}
    assert set(skipped) <= alone
    assert set(skipped) == alone or len(ids) - len(skipped) == min(least, len(ids))


def test_a_question_is_skipped_less_often_than_not_over_many_rounds_and_seeds():
    rules, ids = (
        AdaptiveConfig(skip_after=1, ask_probability=0.25, min_ask_probability=0.1),
        [str(i) for i in range(4000)],
    )
    lengths = dict.fromkeys(ids, 1)
    first, other = (set(questions_to_skip(ids, lengths, rules, seed, 3, 0)) for seed in (0, 1))
    assert len(first) == pytest.approx(3000, abs=120)
    assert len(first & other) == pytest.approx(2250, abs=150)  # independent of each other
    assert first != set(questions_to_skip(ids, lengths, rules, 0, 4, 0))


def config(objective="aft_boundary", adaptive=None, **sampling) -> SamplingConfig:
    tree = {"run_dir": "r", "model": {"name": "m"}, "objective": {"name": objective}}
    return parse_config({**tree, "sampling": {**sampling, "adaptive": adaptive}}).sampling


def test_adaptive_sampling_is_off_unless_it_is_asked_for():
    assert config().adaptive is None
    assert config(adaptive={}).adaptive == AdaptiveConfig()
    assert config(k=4, adaptive={"initial_k": 4}).adaptive.initial_k == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"adaptive": {"initial_k": 7}, "k": 6}, r"sampling\.adaptive\.initial_k \(7\) is more than sampling\.k \(6\)"),
        ({"adaptive": {}, "objective": "rft"}, "rft trains on every right candidate.*sampling.adaptive must be none"),
        ({"adaptive": {}, "objective": "vft"}, "vft samples nothing.*sampling.adaptive must be none"),
        ({"adaptive": {"step": 0}}, "sampling.adaptive.step"),
        ({"adaptive": {"ask_probability": 1.0}}, "sampling.adaptive.ask_probability"),
        ({"adaptive": {"min_ask_probability": 0}}, "sampling.adaptive.min_ask_probability"),
        ({"adaptive": {"max_k": 8}}, r"unknown key sampling\.adaptive\.max_k"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        config(**wrong)


@pytest.mark.parametrize(
    "objective",
    ["align", "aft_detached", "aft_detached_lowest", "aft_boundary", "rrhf", "rrhf_detached", "pro", "pro_detached",
     "dpo", "irpo", "dpop", "grpo"],
)  # fmt: skip
def test_every_objective_that_compares_candidates_takes_it(objective):
    assert config(objective, adaptive={}).adaptive is not None
