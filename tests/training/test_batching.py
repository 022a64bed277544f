"""The plan of a training pass, as properties over random sizes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import make_group

from aft_ray.objectives import build_objective
from aft_ray.storage.records import Verdict
from aft_ray.training.batching import (
    BatchingError,
    GroupSize,
    count_steps,
    group_size,
    plan_pass,
    trained_candidates,
    training_mask,
)

RIGHT, WRONG, UNDECIDED = Verdict.RIGHT, Verdict.WRONG, Verdict.UNDECIDED


@st.composite
def size_lists(draw):
    count = draw(st.integers(0, 40))
    length = st.integers(1, 60)
    return [
        GroupSize(f"q{number}", draw(st.integers(1, 7)), draw(length), draw(length), draw(length), draw(length))
        for number in range(count)
    ]


options = st.fixed_dictionaries(
    {
        "ranks": st.integers(1, 5),
        "groups_per_step": st.integers(1, 12),
        "tokens_per_microbatch": st.integers(1, 900),
        "epochs": st.integers(1, 3),
        "seed": st.integers(0, 3),
        "round": st.integers(0, 3),
    }
)


@settings(max_examples=200, deadline=None)
@given(size_lists(), options)
def test_every_group_once_per_epoch_and_equal_passes_on_every_rank(sizes, given_options):
    epochs = plan_pass(sizes, **given_options)
    assert len(epochs) == given_options["epochs"]
    per_step, budget = given_options["groups_per_step"], given_options["tokens_per_microbatch"]
    assert sum(len(steps) for steps in epochs) == count_steps(len(sizes), per_step, given_options["epochs"])
    for steps in epochs:
        everything = [index for step in steps for share in step.shares for batch in share for index in batch]
        assert sorted(everything) == list(range(len(sizes)))
        for step in steps:
            groups = [index for share in step.shares for batch in share for index in batch]
            assert len(step.shares) == given_options["ranks"]
            assert len({len(share) for share in step.shares}) == 1
            assert any(share[-1] for share in step.shares)  # no pass in which no rank has work
            assert step.totals.groups == len(groups) <= per_step
            assert step.totals.reference_tokens == sum(sizes[index].reference_tokens for index in groups)
            assert step.totals.supervised_tokens == sum(sizes[index].supervised_tokens for index in groups)
            for batch in (batch for share in step.shares for batch in share if len(batch) > 1):
                members = [sizes[index] for index in batch]
                width = max(size.prompt for size in members) + max(size.response for size in members)
                assert sum(size.rows for size in members) * width <= budget
            loads = [sum(sizes[index].padded for batch in share for index in batch) for share in step.shares]
            assert max(loads) - min(loads) <= max(sizes[index].padded for index in groups)


@settings(max_examples=100, deadline=None)
@given(size_lists(), options, st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(sizes, given_options, source):
    shuffled = random.Random(source.random()).sample(sizes, len(sizes))

    def named(order):
        return [
            [[[[order[i].question_id for i in b] for b in share] for share in step.shares] for step in steps]
            for steps in plan_pass(order, **given_options)
        ]

    assert named(sizes) == named(shuffled)


def test_order_follows_seed_round_and_epoch():
    sizes = [GroupSize(f"q{number}", 1, 5, 5, 5, 5) for number in range(30)]

    def order(epoch=0, **changed):
        settings_ = {"seed": 0, "round": 1} | changed
        steps = plan_pass(sizes, ranks=1, groups_per_step=1, tokens_per_microbatch=10, epochs=2, **settings_)[epoch]
        return [step.shares[0][0][0] for step in steps]

    orders = [order(), order(epoch=1), order(seed=1), order(round=2)]
    assert len({tuple(o) for o in orders}) == 4
    assert order() == order()


def test_repeated_ids_are_an_error():
    sizes = [GroupSize("same", 1, 5, 5, 5, 5)] * 2
    with pytest.raises(BatchingError, match="1 groups of round 4 repeat a question"):
        plan_pass(sizes, ranks=1, groups_per_step=1, tokens_per_microbatch=10, epochs=1, seed=0, round=4)


def test_mask_leaves_out_undecided_empty_and_repeated_candidates():
    group = make_group(
        "q",
        [1],
        [2, 3],
        [([4], RIGHT), ([5], WRONG), ([4], RIGHT), ([5], WRONG), ([6], UNDECIDED), ([], WRONG), ([2, 3], RIGHT)],
    )
    assert training_mask(group) == [True, True, False, False, False, False, True]
    assert trained_candidates(group, build_objective("vft")) == []
    assert trained_candidates(group, build_objective("rft")) == [0]  # the last one repeats the reference
    assert trained_candidates(group, build_objective("align")) == [0, 1, 6]
    assert group_size(group, build_objective("rft")) == GroupSize("q", 2, 1, 2, 2, 3)


def test_ranking_skips_candidates_without_a_pair():
    group = make_group("q", [1], [2, 3], [([4], RIGHT), ([5], RIGHT), ([6], UNDECIDED)])
    assert trained_candidates(group, build_objective("aft_boundary")) == []


@pytest.mark.parametrize(("prompt", "reference", "part"), [([], [1], "prompt"), ([1], [], "reference response")])
def test_empty_parts_name_the_question(prompt, reference, part):
    with pytest.raises(BatchingError, match=f"'q' has an empty {part}"):
        group_size(make_group("q", prompt, reference, []), build_objective("vft"))
