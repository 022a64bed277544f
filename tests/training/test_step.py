"""One optimiser step without DeepSpeed: packing, splitting and the order of passes must change nothing."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from padded_reference import step_loss
from peft import LoraConfig, inject_adapter_in_model
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from training_helpers import (
    PAD,
    POISON,
    SIZES,
    PlainEngine,
    batches_of,
    make_group,
    plan,
    poisoned_group,
    random_groups,
    write_tiny_llama,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from aft_ray.config.objectives import OBJECTIVES
from aft_ray.objectives import build_objective
from aft_ray.storage.records import Verdict
from aft_ray.training.batching import trained_responses
from aft_ray.training.forward.packed_attention import use_packed_attention
from aft_ray.training.forward.scoring import install_scoring
from aft_ray.training.model.loading import load_model
from aft_ray.training.step import NonFiniteLoss, batch_loss, compute_gradients, train_step

WEIGHT = 0.7


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def world():
    """A process group of one."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def padded(directory):
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa").train()


@pytest.fixture(scope="module")
def engine(directory):
    model = load_model(directory, "float32")
    install_scoring(model)
    return PlainEngine(model)


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def reference_step(padded, groups, objective):
    """Loss and gradient of the step as one padded batch."""
    padded.zero_grad()
    loss = step_loss(padded, groups, objective, WEIGHT, PAD)
    loss.backward()
    return loss.item(), gradient_of(padded)


def packed_step(engine, groups, objective, budget):
    """The statistics and the gradient of the step in passes of at most `budget` tokens."""
    ((chosen, planned),) = plan(groups, objective, ranks=1, groups_per_step=len(groups), budget=budget)
    engine.module.zero_grad()
    batches = batches_of(groups, chosen, planned, 0, objective)
    stats = train_step(engine, batches, planned, objective, WEIGHT, 0.0)
    return stats, gradient_of(engine.module)


def assert_same_gradient(one, other):
    """No number differs by more than a millionth of the gradient's norm."""
    assert (one - other).abs().max() <= 1e-6 * other.norm()


@pytest.mark.parametrize("budget", [10_000, 60, 21])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_step_is_that_of_padded_rows(padded, engine, name, budget):
    groups, objective = random_groups(10, k=6), build_objective(name)
    loss, gradient = reference_step(padded, groups, objective)
    stats, packed = packed_step(engine, groups, objective, budget)
    assert stats.loss == pytest.approx(loss, abs=1e-6)
    assert_same_gradient(packed, gradient)
    if budget == 10_000:
        assert (stats.passes, stats.score_passes) == (1, 0)
    elif budget == 21 and objective.uses_candidates:
        assert stats.score_passes > 1


token_ids = st.lists(st.integers(1, POISON - 1), min_size=1, max_size=14)


@st.composite
def group_lists(draw):
    groups = []
    for number in range(draw(st.integers(1, 5))):
        prompt, reference = draw(token_ids), draw(token_ids)
        candidates = draw(st.lists(st.tuples(token_ids, st.sampled_from(Verdict)), max_size=7))
        for repeated in draw(st.lists(st.sampled_from([reference, *(ids for ids, _ in candidates)]), max_size=2)):
            candidates.append((repeated, draw(st.sampled_from(Verdict))))
        groups.append(make_group(f"q{number}", prompt, reference, candidates))
    return groups


@settings(max_examples=60, deadline=None)
@given(groups=group_lists(), name=st.sampled_from(sorted(OBJECTIVES)), budget=st.integers(28, 120))
def test_shape_and_split_change_nothing(padded, engine, groups, name, budget):
    objective = build_objective(name)
    loss, gradient = reference_step(padded, groups, objective)
    stats, packed = packed_step(engine, groups, objective, budget)
    assert stats.loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert_same_gradient(packed, gradient)
    lengths = [[len(ids) for ids in trained_responses(group, objective).token_ids] for group in groups]
    least = sum(len(g.prompt_token_ids) + sum(n) - len(n) for g, n in zip(groups, lengths, strict=True))
    assert stats.tokens >= least  # more only by the prompts of groups that were split
    assert stats.score_passes or stats.tokens == least


def test_a_candidate_that_repeats_the_reference_is_not_computed_twice(engine):
    groups = [make_group("q", [1, 2], [3, 4, 5], [([3, 4, 5], Verdict.RIGHT), ([6, 7], Verdict.WRONG)])]
    stats, _ = packed_step(engine, groups, build_objective("align"), 100)
    assert stats.tokens == 2 + 2 + 1
    assert stats.right_score == pytest.approx(-stats.vft_loss)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_rank_makes_the_same_passes(engine, ranks):
    """A rank without any group makes them too, and its gradient is zero and not missing."""
    groups, objective = random_groups(4, k=6), build_objective("align")
    ((chosen, planned),) = plan(groups, objective, ranks=ranks, budget=21)
    assert 0 < planned.score_passes <= planned.train_passes
    for rank in range(ranks):
        engine.outputs.clear()
        engine.boundaries.clear()
        compute_gradients(engine, batches_of(groups, chosen, planned, rank, objective), planned, objective, WEIGHT)
        assert len(engine.outputs) == planned.score_passes + planned.train_passes
        assert engine.boundaries == [False] * (planned.train_passes - 1) + [True]
    engine.module.zero_grad()
    compute_gradients(engine, [], planned, objective, WEIGHT)
    assert not gradient_of(engine.module).any()


@pytest.fixture
def random_engine(directory):
    """The model with adapters that have dropout."""
    torch.manual_seed(1)
    model = load_model(directory, "float32")
    inject_adapter_in_model(LoraConfig(r=4, lora_dropout=0.4, target_modules=["q_proj", "up_proj"]), model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    install_scoring(model)
    return PlainEngine(model)


# Too large for the budget below: a prompt of 4 tokens and 22 of its responses.
LONG = (
    [1, 2, 3, 4],
    [5, 6, 7, 8, 9],
    [([10] * 8, Verdict.RIGHT), ([11] * 7, Verdict.WRONG), ([12] * 6, Verdict.WRONG)],
)
ROOM = 16


def test_dropout_is_repeated_in_the_second_pass_and_new_in_each_first(random_engine):
    groups, objective = [make_group("one", *LONG), make_group("other", *LONG)], build_objective("align")
    ((chosen, planned),) = plan(groups, objective, ranks=1, budget=ROOM)
    pieces = planned.score_passes
    assert pieces == planned.train_passes == 4
    compute_gradients(random_engine, batches_of(groups, chosen, planned, 0, objective), planned, objective, WEIGHT)
    outputs = [output.detach() for output in random_engine.outputs]
    assert all(torch.equal(outputs[number], outputs[pieces + number]) for number in range(pieces))
    by_piece = {}
    for batch, output in zip(planned.shares[0], outputs, strict=False):
        by_piece.setdefault(batch.piece.responses, []).append(output)
    assert all(not torch.equal(*of_both) for of_both in by_piece.values())  # two groups with the same tokens


def test_random_numbers_go_on_after_a_repeated_pass(random_engine):
    """A pass of whole groups behind the pieces has other dropout than the pieces."""
    groups, objective = [make_group("split", *LONG), make_group("whole", *LONG[:2], [])], build_objective("align")
    ((chosen, planned),) = plan(groups, objective, ranks=1, budget=ROOM)
    assert (planned.score_passes, planned.train_passes) == (2, 3)
    batches = batches_of(groups, chosen, planned, 0, objective)
    torch.manual_seed(5)
    compute_gradients(random_engine, batches, planned, objective, WEIGHT)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    with torch.no_grad():
        once = [random_engine(row=batch.row) for batch in batches]
    assert torch.equal(random_engine.outputs[4], once[2])  # behind two passes for scores and their repetition
    assert torch.equal(torch.get_rng_state(), after)


def test_a_loss_that_is_not_finite_names_its_group(tmp_path):
    model = load_model(write_tiny_llama(tmp_path, poisoned=True), "float32")
    install_scoring(model)
    engine = PlainEngine(model)
    objective = build_objective("aft_boundary")
    for budget in (1000, 3):  # whole, and in pieces
        groups = [poisoned_group()]
        ((chosen, planned),) = plan(groups, objective, ranks=1, budget=budget)
        with pytest.raises(NonFiniteLoss, match="the loss is not finite on the questions poisoned") as raised:
            train_step(engine, batches_of(groups, chosen, planned, 0, objective), planned, objective, WEIGHT, 0.0)
        assert raised.value.question_ids == ["poisoned"]


def test_no_pass_waits_for_the_device():
    """The tensors have no content here, and reading one raises."""
    groups, objective = [make_group("split", *LONG), make_group("whole", *LONG[:2], [])], build_objective("align")
    ((chosen, planned),) = plan(groups, objective, ranks=1, budget=ROOM)
    batches = batches_of(groups, chosen, planned, 0, objective)
    assert (planned.score_passes, planned.train_passes) == (2, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
        use_packed_attention(model)
        install_scoring(model)
        measured = compute_gradients(PlainEngine(model), batches, planned, objective, WEIGHT)
        with pytest.raises(DataDependentOutputException):
            measured[0].at_fault()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_loss_waits_for_the_device(name):
    groups, objective = random_groups(6), build_objective(name)
    ((chosen, planned),) = plan(groups, objective, ranks=1, budget=1000)
    (batch,) = batches_of(groups, chosen, planned, 0, objective)
    with FakeTensorMode(allow_non_fake_inputs=True):
        logprobs = torch.zeros(batch.row.responses, requires_grad=True)
        loss, _ = batch_loss(logprobs, batch, objective, WEIGHT, planned.totals)
        torch.autograd.backward(loss)
        assert logprobs.grad is not None
