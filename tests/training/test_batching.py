"""The plan of an optimiser step, as properties over random sizes."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_helpers import make_group

from aft_ray.objectives import build_objective
from aft_ray.storage.records import Verdict
from aft_ray.training.balance import Load, load_of, packed_tokens, padded_tokens, spread_packed, spread_padded
from aft_ray.training.batching import (
    BatchingError,
    GroupSize,
    count_steps,
    group_size,
    plan_step,
    trained_candidates,
    trained_responses,
    training_mask,
    training_order,
)

RIGHT, WRONG, UNDECIDED = Verdict.RIGHT, Verdict.WRONG, Verdict.UNDECIDED
LONGEST = 60  # tokens of a prompt, and of a response, in the random sizes
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


@st.composite
def size_lists(draw):
    length = st.integers(1, LONGEST)
    return [
        GroupSize(f"q{number}", draw(length), tuple(draw(st.lists(length, min_size=1, max_size=9))))
        for number in range(draw(st.integers(1, 30)))
    ]


options = st.fixed_dictionaries(
    {"ranks": st.integers(1, 5), "budget": st.integers(2 * LONGEST, 900), "prompts_shared": st.booleans()}
)


def load_of_batch(sizes, batch):
    """The loads of a batch's groups, or of its piece."""
    if batch.piece is None:
        return [load_of(sizes[index].prompt, sizes[index].responses) for index in batch.groups]
    (index,) = batch.groups
    return [load_of(sizes[index].prompt, [sizes[index].responses[one] for one in batch.piece.responses])]


@settings(max_examples=300, deadline=None)
@given(size_lists(), options)
def test_every_group_once_within_the_budget_and_equal_passes_on_every_rank(sizes, given_options):
    plan = plan_step(sizes, **given_options)
    assert plan == plan_step(sizes, **given_options)
    ranks, shared = given_options["ranks"], given_options["prompts_shared"]
    assert len(plan.shares) == ranks
    batches = [batch for share in plan.shares for batch in share]
    computed = [(index, None) for batch in batches if not batch.piece for index in batch.groups]
    computed += [(*batch.groups, one) for batch in batches if batch.piece for one in batch.piece.responses]
    split = {batch.groups[0] for batch in batches if batch.piece}
    whole = [(index, None) for index in range(len(sizes)) if index not in split]
    parts = [(index, one) for index in split for one in range(len(sizes[index].responses))]
    assert sorted(computed, key=str) == sorted(whole + parts, key=str)

    tokens = packed_tokens if shared else padded_tokens
    assert all(batch.groups and tokens(load_of_batch(sizes, batch)) <= given_options["budget"] for batch in batches)
    assert max(map(len, plan.shares)) == plan.train_passes
    pieces = len(batches) < ranks * plan.train_passes  # then nothing is left that could be spread further
    assert not pieces or all(len(batch.groups) == 1 for batch in batches)


@settings(max_examples=200, deadline=None)
@given(size_lists(), options)
def test_pieces_come_first_and_their_scores_have_places(sizes, given_options):
    plan = plan_step(sizes, **given_options)
    counted, taken = {}, set()
    for share in plan.shares:
        kinds = [batch.piece is not None for batch in share]
        assert kinds == sorted(kinds, reverse=True)
        assert sum(kinds) <= plan.score_passes <= plan.train_passes
        for batch in share[: sum(kinds)]:
            (index,) = batch.groups
            assert tokens_of(sizes[index], given_options["prompts_shared"]) > given_options["budget"]
            counted.setdefault(index, []).append(batch.piece.counted)
            places = {(batch.piece.first + one) for one in batch.piece.responses}
            assert not places & taken
            taken |= places
    assert all(sum(one) == 1 for one in counted.values())
    assert taken == set(range(plan.split_responses))
    assert bool(plan.score_passes) == bool(counted)


def tokens_of(size, shared):
    return (packed_tokens if shared else padded_tokens)([load_of(size.prompt, size.responses)])


@settings(max_examples=100, deadline=None)
@given(size_lists(), options)
def test_the_totals_are_those_of_the_step(sizes, given_options):
    totals = plan_step(sizes, **given_options).totals
    assert totals.groups == len(sizes)
    assert totals.reference_tokens == sum(size.responses[0] for size in sizes)
    assert totals.supervised_tokens == sum(sum(size.responses) for size in sizes)


loads = st.lists(
    st.builds(
        Load, tokens=st.integers(1, 50), rows=st.integers(1, 5), longest=st.integers(1, 20), work=st.integers(1, 1000)
    ),
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(loads, st.integers(1, 8), st.integers(1, 120), st.booleans())
def test_a_spread_has_each_load_once_and_fills_every_pass(loads, passes, capacity, shared):
    spread, tokens = (spread_packed, packed_tokens) if shared else (spread_padded, padded_tokens)
    members = spread(loads, passes, capacity)
    if members is None:
        # More passes than loads always have room, unless one load alone has too many tokens.
        possible = all(tokens([load]) <= capacity for load in loads)
        assert (spread(loads, len(loads), capacity) is not None) == possible
        return
    assert len(members) == passes
    assert sorted(index for one in members for index in one) == list(range(len(loads)))
    assert all(tokens([loads[index] for index in one]) <= capacity for one in members)
    assert sum(map(bool, members)) == min(passes, len(loads))


def test_a_full_pass_gives_way_to_an_exchange():
    # Each to the lightest leaves 600 + 300 + 200 beside 500 + 400: then 600 and 500 change places.
    loads = [load_of(0, [tokens + 1]) for tokens in (600, 500, 400, 300, 200)]
    members = spread_packed(loads, 2, 2000)
    assert sorted(sum(loads[i].tokens for i in one) for one in members) == [1000, 1000]


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
@pytest.mark.parametrize("ranks", [8, 16, 32, 64])
@pytest.mark.parametrize("per_rank", [6, 12, 18])
def test_ranks_wait_little_for_each_other_on_gsm8k(ranks, per_rank):
    """From 6 groups a rank on, the slowest rank of every pass has at most 5 % more work than the mean."""
    questions = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    source = random.Random(ranks * per_rank)
    for candidates in (0, 6, 8):
        sizes = []
        for number in range(ranks * per_rank):
            chosen = source.choice(questions)
            reference = 1 + len(chosen["answer"]) // 4  # about four characters are a token
            # Candidates are as long as a reference, give or take; a group of one kind is not compared.
            count = candidates if source.random() < 0.6 else 0
            lengths = [max(1, round(reference * source.uniform(0.6, 1.5))) for _ in range(count)]
            sizes.append(GroupSize(str(number), 1 + len(chosen["question"]) // 4, (reference, *lengths)))
        plan = plan_step(sizes, ranks=ranks, budget=8192)
        work = [[sum(load.work for load in load_of_batch(sizes, batch)) for batch in share] for share in plan.shares]
        slowest = sum(max(share[number] for share in work) for number in range(plan.train_passes))
        assert slowest <= 1.05 * sum(map(sum, work)) / ranks


def test_work_counts_what_a_token_sees():
    # A prompt of 2 and responses with 3 and 1 inputs: 2 + 3 + 1 tokens; 3 + (3 x 2 + 6) + (1 x 2 + 1) pairs.
    load = load_of(2, [4, 2])
    assert (load.tokens, load.rows, load.longest) == (6, 2, 5)
    assert load.work == 6 * 6 * 4096 + 3 + 12 + 3


def test_a_response_beyond_the_budget_names_the_question():
    with pytest.raises(BatchingError, match=r"'q1' has a prompt and a response of 130 tokens .* raise that key"):
        plan_step([GroupSize("q0", 1, (1,)), GroupSize("q1", 30, (5, 100))], ranks=2, budget=128)


def test_a_split_group_has_the_fewest_pieces_of_equal_work():
    plan = plan_step([GroupSize("q", 10, (21, 21, 21, 11))], ranks=1, budget=50)
    pieces = [batch.piece for batch in plan.shares[0]]
    assert sorted(sum([(20, 20, 20, 10)[one] for one in piece.responses]) for piece in pieces) == [30, 40]
    assert (plan.train_passes, plan.score_passes, plan.split_responses) == (2, 2, 4)


def reference_order(ids, seed, round, epoch):
    from hashlib import sha256

    return sorted(range(len(ids)), key=lambda i: sha256(f"{seed}\0{round}\0{epoch}\0{ids[i]}".encode()).digest())


def test_the_order_is_that_of_digests_and_follows_seed_round_and_epoch():
    ids = [f"q{number}" for number in range(200)]
    keys = [(0, 1, 0), (0, 1, 1), (1, 1, 0), (0, 2, 0)]
    orders = [training_order(ids, *key).tolist() for key in keys]
    assert orders == [reference_order(ids, *key) for key in keys]
    assert len(set(map(tuple, orders))) == 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=4), unique=True, max_size=30), st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(ids, source):
    shuffled = source.sample(ids, len(ids))
    named = [[some[index] for index in training_order(some, 5, 2, 0)] for some in (ids, shuffled)]
    assert named[0] == named[1]


def test_repeated_ids_are_an_error():
    with pytest.raises(BatchingError, match="1 groups of round 4 repeat a question"):
        training_order(["same", "other", "same"], 0, 4, 0)


def test_steps_of_a_round():
    assert [count_steps(questions, 8, 2) for questions in (0, 1, 8, 9)] == [0, 2, 2, 4]


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
    assert group_size(group, build_objective("rft")) == GroupSize("q", 1, (2, 1))


def test_a_candidate_that_repeats_the_reference_is_computed_with_it():
    group = make_group("q", [1], [2, 3], [([4], WRONG), ([2, 3], RIGHT), ([5, 6, 7], WRONG)])
    trained = trained_responses(group, build_objective("align"))
    assert trained.token_ids == ([2, 3], [4], [5, 6, 7])
    assert trained.slots == {0: 1, 1: 0, 2: 2}
    assert group_size(group, build_objective("align")) == GroupSize("q", 1, (2, 1, 3))


def test_ranking_skips_candidates_without_a_pair():
    group = make_group("q", [1], [2, 3], [([4], RIGHT), ([5], RIGHT), ([6], UNDECIDED)])
    assert trained_candidates(group, build_objective("aft_boundary")) == []


@pytest.mark.parametrize(("prompt", "reference", "part"), [([], [1], "prompt"), ([1], [], "reference response")])
def test_empty_parts_name_the_question(prompt, reference, part):
    with pytest.raises(BatchingError, match=f"'q' has an empty {part}"):
        group_size(make_group("q", prompt, reference, []), build_objective("vft"))
