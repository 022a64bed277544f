"""Scores, losses and gradients without DeepSpeed: padding and the split into micro-batches must change nothing."""

import pytest
import torch
import torch.nn.functional as F
from training_helpers import PAD, plan, random_groups, write_tiny_llama

from aft_ray.config.objectives import OBJECTIVES
from aft_ray.objectives import build_objective
from aft_ray.storage.records import Verdict
from aft_ray.training.batching import StepTotals, trained_candidates
from aft_ray.training.collate import DUMMY, REFERENCE, collate
from aft_ray.training.loading import load_model
from aft_ray.training.step import micro_loss, response_logprobs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_tiny_llama(tmp_path_factory.mktemp("model")), "float32")


def unpadded_logprob(model, prompt, response):
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return -F.cross_entropy(logits, torch.tensor(response), reduction="sum").item()


def test_padded_scores_equal_unpadded_ones(model):
    groups = random_groups(6)
    objective = build_objective("aft_boundary")
    batch = collate(groups, objective, PAD)
    with torch.no_grad():
        sums, tokens = response_logprobs(model, batch)
        expected = []
        for group in groups:
            chosen = [group.candidates[i].token_ids for i in trained_candidates(group, objective)]
            expected += [(group.prompt_token_ids, ids) for ids in [group.reference_token_ids, *chosen]]
        assert len(expected) == len(sums) > len(groups)
        assert tokens.tolist() == [len(response) for _, response in expected]
        assert sums.tolist() == pytest.approx([unpadded_logprob(model, *row) for row in expected], abs=1e-5)


def test_each_row_has_its_group_and_slot():
    groups = random_groups(6)
    objective = build_objective("align")
    batch = collate(groups, objective, PAD)
    expected = [(g, s) for g, group in enumerate(groups) for s in [REFERENCE, *trained_candidates(group, objective)]]
    assert list(zip(batch.group_of_row.tolist(), batch.slot_of_row.tolist(), strict=True)) == expected
    assert batch.mask.nonzero().tolist() == [list(position) for position in expected if position[1] >= 0]


def loss_and_gradient(model, groups, micro_batches, objective, totals):
    model.zero_grad()
    total = 0.0
    for indexes in micro_batches:
        loss, stats = micro_loss(model, collate([groups[i] for i in indexes], objective, PAD), objective, 0.7, totals)
        loss.backward()
        total += loss.item()
        assert stats.at_fault == []
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_split_into_micro_batches_changes_nothing(model, name):
    groups, objective = random_groups(10), build_objective(name)
    (step,) = plan(groups, objective, ranks=3, groups_per_step=10, budget=100)[0]
    split = [batch for share in step.shares for batch in share]
    assert len(split) >= 3
    whole, gradient = loss_and_gradient(model, groups, [range(10)], objective, step.totals)
    parts, split_gradient = loss_and_gradient(model, groups, [*split, ()], objective, step.totals)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert torch.allclose(gradient, split_gradient, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_one_batch_is_the_mean_over_its_groups(model, name):
    """The loss of a step is L_VFT + w * objective(...), or the objective alone when it covers the references."""
    groups, objective = random_groups(8), build_objective(name)
    (step,) = plan(groups, objective, ranks=1, groups_per_step=8)[0]
    with torch.no_grad():
        loss, _ = micro_loss(model, collate(groups, objective, PAD), objective, 0.7, step.totals)
        k = max(len(group.candidates) for group in groups)
        scores, tokens = torch.zeros(8, k), torch.zeros(8, k, dtype=torch.long)
        mask = torch.zeros(8, k, dtype=torch.bool)
        references = []
        for g, group in enumerate(groups):
            logprob = unpadded_logprob(model, group.prompt_token_ids, group.reference_token_ids)
            references.append((logprob, len(group.reference_token_ids)))
            for i in trained_candidates(group, objective):
                ids = group.candidates[i].token_ids
                scores[g, i] = unpadded_logprob(model, group.prompt_token_ids, ids) / len(ids)
                tokens[g, i], mask[g, i] = len(ids), True
        rewards = torch.tensor([[c.reward for c in group.candidates] for group in groups])
        own = objective(
            scores,
            rewards,
            mask,
            tokens=tokens,
            correct=torch.tensor([[c.verdict is Verdict.RIGHT for c in group.candidates] for group in groups]),
            sampler_scores=torch.tensor([[c.score for c in group.candidates] for group in groups]),
            reference_scores=torch.tensor([s / n for s, n in references]),
            reference_tokens=torch.tensor([n for _, n in references]),
        ).item()
    vft = -sum(s for s, _ in references) / sum(n for _, n in references)
    expected = own if objective.replaces_reference_loss else vft + 0.7 * own
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_an_empty_micro_batch_adds_exactly_nothing(model):
    objective = build_objective("aft_boundary")
    batch = collate([], objective, PAD)
    assert batch.slot_of_row.tolist() == [DUMMY]
    loss, stats = micro_loss(model, batch, objective, 1.0, StepTotals(4, 20, 40))
    model.zero_grad()
    loss.backward()
    assert loss.item() == 0
    assert not stats.sums.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_loss_that_is_not_finite_names_its_group(model):
    groups, objective = random_groups(3), build_objective("aft_boundary")
    batch = collate(groups, objective, PAD)
    spoiled = batch.slot_of_row.eq(REFERENCE) & batch.group_of_row.eq(1)

    def spoiling(**inputs):
        output = model(**inputs)
        output.logits = torch.where(spoiled[:, None, None], torch.nan, output.logits)
        return output

    _, stats = micro_loss(spoiling, batch, objective, 1.0, StepTotals(3, 20, 40))
    assert stats.at_fault == ["q1"]
